"""Megatron is patched before the tests of this folder import it."""

from moelpr.model.megatron import bootstrap

bootstrap.install_patches()
