"""The upload of a model to the Hugging Face Hub: which files of a folder, and how."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from checkpoint_convert.card.front_matter import read_card
from checkpoint_convert.card.graft_record import Graft
from checkpoint_convert.hf.hub import DOWNLOADED
from checkpoint_convert.hf.model_files import BASE_CARD_FILE, MODEL_STEM
from moelpr.base import records
from moelpr.base.errors import DISK_FULL, MachineError, UserError, first_line
from moelpr.base.files import check_links
from moelpr.base.model_code import refuse_code
from moelpr.base.secrets import LOCAL_PATH, SECRET
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.model.families.hub import is_hub_name

# A model and its records, or a folder of moelpr model gguf; nothing else, so neither optimizer states nor logs.
_UPLOADED = (*DOWNLOADED, BASE_CARD_FILE, Graft.FILE_NAME, "packs.json", "calibration.json", "*.gguf", "Modelfile")
_UPLOADED += ("pack.json", "sums.safetensors", "adapter_config.json", "adapter_model.safetensors")  # a pack's
_TEXT = (".json", ".jinja", ".md", ".txt", "")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # their words may look like paths
_STALE = [f"{MODEL_STEM}*.safetensors", f"{MODEL_STEM}.safetensors.index.json"]


@dataclass(frozen=True)
class Upload:
    """A folder's files by name with their sizes, those that stay, and the card's metadata."""

    folder: Path
    files: dict[str, int]
    left_out: list[str]
    card: Any

    @classmethod
    def of(cls, folder: Path, allow_paths: bool = False) -> "Upload":
        """Choose the files of a folder.

        Raises:
            UserError: There is no model or no card, the card names no licence, or a file has a secret or names a
                folder of this machine (without `allow_paths`).
        """
        refuse_code(folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        patterns = [(pattern, pattern.count("/")) for pattern in _UPLOADED]  # a star stands for no slash
        files = [name for name in names if any(fnmatch(name, one) and name.count("/") == n for one, n in patterns)]
        if not any(name.endswith((".safetensors", ".gguf")) for name in files):
            raise UserError(
                f"{folder} contains no model; pass a folder that moelpr model export, graft or gguf, or pack make wrote"
            )
        for name in files:
            check_links(folder / name, folder)
            _check_text(folder / name, allow_paths)
        if (card := read_card(folder)) is None:
            raise UserError(
                f"{folder} has no README.md; a model on the Hub needs a card, as moelpr model export writes it"
            )
        if not card.data.get("license"):
            raise UserError(
                f"the card of {folder} names no licence; add it with moelpr model card {folder} --license ID"
            )
        sizes = {name: (folder / name).stat().st_size for name in files}
        return cls(folder, sizes, [name for name in names if name not in files], card)

    def send(self, repository: str, private: bool, overwrite: bool) -> str:
        """Upload the files, and return the address; a repeated call resumes.

        Raises:
            UserError: Nobody is logged in, the repository belongs to others, or it has another model (without
                `overwrite`).
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with _explained(repository):
            api.whoami()
            if not overwrite and (other := self._other_model(api, repository)):
                raise UserError(
                    f"{repository} has another model ({other}) already; choose another name, or --overwrite"
                )
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=self.folder,
                allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in self.files],
                delete_patterns=_STALE,  # shards of an earlier upload would be read with these
                commit_message="Upload with moelpr",
            )
        return str(address)

    def _other_model(self, api: Any, repository: str) -> str:
        """The class of the model that the repository has, if its configuration is not that of the folder."""
        if not (self.folder / CONFIG_FILE).is_file() or not api.file_exists(repository, CONFIG_FILE):
            return ""
        files = self.folder / CONFIG_FILE, Path(api.hf_hub_download(repository, CONFIG_FILE))
        same = {"transformers_version": None}  # whatever it is
        ours, theirs = (records.read(dict[str, Any], file, "download it again") | same for file in files)
        return "" if ours == theirs else ", ".join(theirs.get("architectures") or ["unknown"])


def check_name(repository: str) -> None:
    if not is_hub_name(repository):
        raise UserError(f"the repository must be OWNER/NAME, got {repository}")


def _check_text(path: Path, allow_paths: bool) -> None:
    if path.suffix not in _TEXT:
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if found := SECRET.search(text):
        raise UserError(f"{path} contains what looks like a secret ({found[0][:6]}…); remove it, and revoke it")
    if not allow_paths and path.name not in _VOCABULARY and (found := LOCAL_PATH.search(text)):
        raise UserError(f"{path} names a folder of this machine ({found[0]}); edit it, or pass --allow-paths")


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn the errors of the Hub's library into one sentence each."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except (UserError, MemoryError):
        raise
    except LocalTokenNotFoundError as error:
        raise UserError("nobody is logged in to the Hub; run hf auth login, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError("the Hub does not accept this login; run hf auth login, or set HF_TOKEN again") from error
        if status == 403:
            raise UserError(f"this login may not write to {repository}; use a token with write access to it") from error
        said = error.server_message or first_line(error)
        raise MachineError(f"the Hub answers {status} ({said}); run it again to resume") from error
    except Exception as error:  # the network and its libraries have many kinds
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        if isinstance(error, ValueError) and "README.md" in str(error):
            raise UserError(f"the Hub refuses the card ({' '.join(str(error).split())}); correct README.md") from error
        raise MachineError(f"the Hub can't be reached ({first_line(error)}); run it again to resume") from error
