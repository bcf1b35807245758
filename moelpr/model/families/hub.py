"""Files of models that are named as on the Hugging Face Hub."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moelpr.base.errors import DISK_FULL, UserError
from moelpr.model.families.hf_config import CONFIG_FILE


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def is_on_hub(name: str | Path) -> bool:
    """Whether this is no path that is there, and has the form owner/name or owner/name@revision."""
    owned, _, revision = str(name).partition("@")
    return not Path(name).exists() and is_hub_name(owned) and re.fullmatch(r"[\w./-]*", revision) is not None


def download(name: str, patterns: Sequence[str], what: str = "model") -> Path:
    """The cache's folder, named by the commit, with the files that match `patterns`; UserError if it can't be had.

    Args:
        name: owner/name, or owner/name@revision with a branch, tag or commit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from tqdm import tqdm

    # A config.json is there at once: no progress bar.
    bar: Any = partial(tqdm, disable=True) if list(patterns) == [CONFIG_FILE] else None
    try:
        owned, _, revision = name.partition("@")
        return Path(snapshot_download(owned, revision=revision or None, allow_patterns=list(patterns), tqdm_class=bar))
    except Exception as error:  # the Hub, the network and its libraries have many kinds
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        if isinstance(error, GatedRepoError):
            raise UserError(
                f"{name} is gated; accept its conditions on its page on the Hub, and log in with hf auth login or "
                "HF_TOKEN"
            ) from error
        if isinstance(error, RepositoryNotFoundError):
            raise UserError(
                f"the Hub has no model {name}, or it is private; correct the name, or log in with hf auth login or "
                "HF_TOKEN"
            ) from error
        reason = " ".join((str(error) or type(error).__name__).split())
        if isinstance(error, LocalEntryNotFoundError):  # its message is about the library's arguments
            reason = "the Hub can't be reached, or HF_HUB_OFFLINE is set, and the cache doesn't contain it"
        files = f"{name} {CONFIG_FILE}" if list(patterns) == [CONFIG_FILE] else name
        raise UserError(
            f"there is no folder {name}, and the {what} of this name can't be downloaded ({reason}); where there is a "
            f"network, run hf download {files} --local-dir DIR, and pass DIR"
        ) from error


def config_folder(path: Path) -> Path:
    """The folder with a model's config.json: `path`, or that of the model on the Hub that it names."""
    return download(str(path), [CONFIG_FILE], CONFIG_FILE) if is_on_hub(path) else path
