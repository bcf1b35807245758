"""The trainer's command line: Megatron's flags, ours, recipes, and every check across them.

Settings come from four sources, each overriding the previous: the model's shape in the checkpoint's `model_spec.json`,
the recipe (`--recipe FILE`, a YAML file of flags), the command line, and what machine and method require.
"""

from moelpr.arguments.flags import all_arguments
from moelpr.arguments.parse import parse_arguments, refused_by_megatron
from moelpr.arguments.settings import resolved_settings

__all__ = ["all_arguments", "parse_arguments", "refused_by_megatron", "resolved_settings"]
