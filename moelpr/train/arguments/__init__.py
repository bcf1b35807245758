"""The trainer's command line: Megatron's flags, ours, recipes, and every check across them.

Settings come from four sources, each overriding the previous: the model's shape in the checkpoint's `model_spec.json`,
the recipe (`--recipe FILE`, a YAML file of flags), the command line, and what machine and method require.
"""
