"""Models named as on the Hugging Face Hub: downloads weights, config and tokenizer, but no pickles and no code."""

from dataclasses import dataclass
from pathlib import Path

from checkpoint_convert.hf.model_files import COMPANION_FILES, COMPANION_FOLDERS, MODEL_STEM
from moelpr.base import checksums
from moelpr.base.errors import UserError
from moelpr.model.families.hub import download, is_hub_name

# Not *.safetensors: repositories also keep weights of other formats, such as consolidated.safetensors.
DOWNLOADED = (
    f"{MODEL_STEM}.safetensors",
    f"{MODEL_STEM}-*.safetensors",
    f"{MODEL_STEM}.safetensors.index.json",
    *COMPANION_FILES,
    checksums.FILE_NAME,
    *(f"{folder}/*.jinja" for folder in COMPANION_FOLDERS),
)


@dataclass(frozen=True)
class Model:
    """A Hugging Face directory on this machine."""

    folder: Path
    name: str  # owner/name on the Hub, or the name of the folder
    revision: str | None = None  # commit on the Hub; None for a folder


def find_model(path: Path, revision: str | None = None) -> Model:
    """The folder `path`, or the model of the Hub that it names, in the Hub's cache.

    Args:
        revision: Branch, tag or commit on the Hub; None for its main branch.

    Raises:
        UserError: there is neither, or the Hub can't be reached.
    """
    if path.exists() or not is_hub_name(str(path)):
        if revision is not None:
            raise UserError(f"--revision names a revision on the Hub, but {path} is a local path; remove --revision")
        return Model(path, path.resolve().name)
    folder = download(str(path), revision, DOWNLOADED)
    return Model(folder, str(path), folder.name)
