"""Tiny models."""

from tests.support.hf_models import make_model  # noqa: F401
