"""Faults of Megatron Core 0.19.2 that hit every machine, and the smallest cure of each.

`tests/unit/compat/test_megatron_fixes.py` fails once a fix is no longer needed.
"""

import importlib.util


def install() -> None:
    _use_the_built_dataset_helper()


def _use_the_built_dataset_helper() -> None:
    """Megatron runs `make` for its dataset helper at every start; the wheel has the built helper and no Makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return  # a source checkout: let Megatron build it
    import megatron.core.datasets.utils as dataset_utils

    dataset_utils.compile_helpers = lambda: None
