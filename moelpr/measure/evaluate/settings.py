"""Settings that commands which measure models share."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from moelpr.base.checksums import Verify, VerifyFlag
from moelpr.base.command import check_is_utf8
from moelpr.base.errors import UserError
from moelpr.base.languages import canonical
from moelpr.base.quantities import as_argument
from moelpr.base.settings import Count, Flags, Natural
from moelpr.model.families.hf_config import check_model

if TYPE_CHECKING:
    from moelpr.measure.evaluate.scoring import Settings as Windows

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def languages(text: str) -> list[str]:
    return [canonical(language.strip()) for language in text.split(",") if language.strip()]


def _folder(text: str, is_hf: bool) -> Path:
    check_model(Path(text), is_hf=is_hf)
    return Path(text)


# The folder of a Hugging Face model, or of any model, checkpoint or adapter, which is checked at once.
HfFolder = Annotated[Path, {"type": as_argument(partial(_folder, is_hf=True)), "metavar": "DIR"}]
Source = Annotated[Path, {"type": as_argument(partial(_folder, is_hf=False)), "metavar": "DIR"}]
Languages = Annotated[list[str], {"nargs": None, "type": languages, "metavar": "en,el,..."}]


class DeviceFlags(Flags):
    """loading"""

    device: str = "auto"  # cpu, cuda, cuda:N or auto: a GPU if any, and as many as the model needs
    dtype: Dtype = "auto"  # auto: float32 on a CPU, the model's own on a GPU
    verify: VerifyFlag = Verify.FULL  # do not compare files with the checksums in checksums.json


class ReadingFlags(Flags):
    """text"""

    json_key: str = "text"  # key of the text
    max_documents: Count | None = None  # documents per text (default: all)
    sequence_length: Count | None = None  # window in tokens (default: 512, or the models' maximum if that is less)
    context: int | None = None  # overlap of a document's windows, in tokens (default: a quarter of the window)
    batch_size: Count | None = None  # full windows per batch (default: what fits in memory)
    skip_tokens: Natural = 0  # tokens at the start of documents that do not count, e.g. 32 for a chat model
    json: bool = False  # print one line of JSON instead of tables

    def windows(self) -> "Windows":
        """How text is cut."""
        from moelpr.measure.evaluate.scoring import Settings

        return Settings(self.sequence_length, self.context, self.batch_size, self.skip_tokens)


def named_paths(items: list[str], flag: str) -> dict[str, str]:
    """NAME=DIR or LANG=FILE arguments by name; the name of a bare --model path is that of its last folder."""
    form, example = ("NAME=DIR", "base") if flag == "--model" else ("LANG=FILE", "en")
    named: dict[str, str] = {}
    for item in items:
        name, separator, path = item.partition("=")
        if not separator and flag == "--model":
            name, path = Path(item).resolve().name, item
        check_is_utf8(item, f"{flag} argument")
        if not name or not path:
            raise UserError(f"{flag} must be {form}, such as {example}={item.strip('=')}, got {item}")
        name = name if flag == "--model" else canonical(name)
        if name in named:
            raise UserError(f"{flag} has {name} twice ({named[name]} and {path}); give each its own name as {form}")
        named[name] = path
    return named
