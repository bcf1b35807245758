"""The trainer's command line: Megatron's flags, ours, recipes, and every check across fields.

Settings come from four places, each overriding the one before: the model's shape from the checkpoint's
`model_spec.json`, the recipe (`--recipe FILE`, a YAML file whose keys are flags), the command line, and last what
machine and method force. All four speak in Megatron's and our flags.

    parse.py    the story: gather the settings, check them all, hand them to Megatron
    sources.py  where a run starts, and its settings from model_spec.json, recipe and command line
    recipe.py   a YAML recipe as command-line words
    flags.py    our flags beside Megatron's, and a parser that reports every wrong word
    machine.py  what the machine decides: CPU or GPU, Transformer Engine, Apex
    method.py   what the stage decides: defaults of the paper, and flags of Megatron that would change the method
    record.py   the run's final settings, for recipe.yaml
    checks/     every check, each a small function that yields what is wrong
"""

from moelpr.arguments.flags import add_arguments
from moelpr.arguments.parse import parse_arguments, refused_by_megatron
from moelpr.arguments.recipe import recipe_to_flags
from moelpr.arguments.record import resolved_settings
from moelpr.arguments.sources import checkpoint_source

__all__ = [
    "add_arguments",
    "checkpoint_source",
    "parse_arguments",
    "recipe_to_flags",
    "refused_by_megatron",
    "resolved_settings",
]
