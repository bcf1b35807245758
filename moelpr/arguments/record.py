"""The run's final settings, written into and beside its checkpoints as recipe.yaml."""

import argparse
from typing import Any

import torch


def resolved_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Every flag of the run with its final value, as plain YAML types."""
    plain = (str, int, float, bool, type(None))  # by exact type: enums that are also ints are no YAML
    settings: dict[str, Any] = {}
    for name, value in sorted(vars(args).items()):
        if type(value) in plain:
            settings[name] = value
        elif isinstance(value, list) and all(type(item) in plain for item in value):
            settings[name] = list(value)
        elif isinstance(value, torch.dtype):
            settings[name] = str(value)
    return settings
