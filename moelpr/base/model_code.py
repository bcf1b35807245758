"""Settings by which a model names code: its own, of a repository, or a kernel.

They are left out when a model is read, and when one is written. So they reach no reader, not even one that trusts them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError

_KEYS = {"auto_map", "custom_generate", "custom_pipelines", "trust_remote_code", "kernel_config", "use_kernels"}
_KERNEL_KEYS = ("_implementation", "_implementation_internal")  # ends of names: of attention, experts …


def without_code(settings: Any) -> Any:
    """The content of a JSON file without these settings, also of its parts."""
    if isinstance(settings, dict):
        names_code = {key for key in settings if key in _KEYS or key.endswith(_KERNEL_KEYS)}
        return {key: without_code(value) for key, value in settings.items() if key not in names_code}
    return [without_code(item) for item in settings] if isinstance(settings, list) else settings


def drop_code(folder: Path) -> None:
    """Rewrite the JSON files of a folder that have such settings."""
    for path, kept in _with_code(folder):
        path.write_text(json.dumps(kept, indent=2) + "\n")


def refuse_code(folder: Path) -> None:
    """Raise a UserError if a folder has such settings, before another program reads it."""
    for path, _ in _with_code(folder):
        raise UserError(f"{path} names code, such as auto_map, that its readers would run; export the model again")


def _with_code(folder: Path) -> Iterator[tuple[Path, Any]]:
    """The JSON files that have such settings, and what is left without; not those that no reader could parse."""
    for path in sorted(folder.rglob("*.json")):
        if path.name not in ("tokenizer.json", "vocab.json") and path.is_file():
            try:
                settings = json.loads(path.read_bytes())
                if (kept := without_code(settings)) != settings:
                    yield path, kept
            except ValueError:
                continue
            except RecursionError:
                raise UserError(f"{path} is nested too deeply; download it again") from None
