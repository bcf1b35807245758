"""Models named as on the Hugging Face Hub: downloads weights, config and tokenizer, but no pickles and no code."""

from dataclasses import dataclass
from pathlib import Path

from checkpoint_convert.hf.model_files import COMPANION_FILES, COMPANION_FOLDERS, MODEL_STEM
from moelpr.base import checksums
from moelpr.model.families.hf_config import check_model
from moelpr.model.families.hub import download, is_on_hub

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


def find_model(path: Path) -> Model:
    """The folder `path`, or the model of the Hub that it names, in the Hub's cache.

    Raises:
        UserError: there is neither, or no model in it, or the Hub can't be reached.
    """
    model = Model(path, path.resolve().name)
    if is_on_hub(path):
        folder = download(str(path), DOWNLOADED)
        model = Model(folder, str(path).partition("@")[0], folder.name)
    check_model(model.folder, is_hf=True)
    return model
