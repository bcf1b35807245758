"""MoE-LPR: add languages to a large language model without losing the ones it has (arXiv 2408.11396)."""

import sys

from moelpr.base import command, machine

# Before any command imports torch, which takes seconds and reads the settings of its threads.
machine.limit_threads()
sys.excepthook, sys.unraisablehook = command.show_exception, command.show_unraisable

__version__ = "0.2.0"
