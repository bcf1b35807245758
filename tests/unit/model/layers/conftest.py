"""Megatron is patched before the tests of this folder import it."""

from moelpr.megatron_patches import bootstrap

bootstrap.install_patches()
