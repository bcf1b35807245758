"""MoE-LPR: add languages to a large language model without losing the ones it has (arXiv 2408.11396)."""

__version__ = "0.1.0"
