"""Megatron is patched before the tests of these folders import it."""

from moelpr.model.megatron import bootstrap

bootstrap.install_patches()
