"""Settings that several converters have."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from moelpr.base.checksums import Verify, VerifyFlag
from moelpr.base.files import refuse_existing
from moelpr.base.settings import REPEATED, Flags, Folder, choices, either, metavar, number
from moelpr.data.text.reading import read_documents
from moelpr.data.text.sources import named_files
from moelpr.measure.evaluate.settings import Dtype, HfFolder, named_paths
from moelpr.model.families.moe_classes import MOE_CLASSES


class OutputFlags(Flags):
    """output; an interrupted command leaves .NAME.partial next to the --save folder; rerun it to resume"""

    save: Folder  # folder to write
    overwrite: bool = False  # replace an existing output at --save
    verify: VerifyFlag = Verify.FULL  # do not compare files with the checksums in checksums.json

    def __post_init__(self) -> None:
        refuse_existing([self.save], self.overwrite)


class DtypeFlags(OutputFlags):
    """weights"""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # dtype of the output (default: the input's)


class TextFlags(Flags):
    """text and how it is read"""

    max_tokens: Annotated[int, number(int, 100)] = 1024  # tokens of each text
    json_key: str = "text"  # key of the text
    # JSON lines with "text", whose documents are left out, such as text to evaluate on; repeat for several
    exclude: Annotated[list[str], REPEATED, metavar("FILE")] = []
    device: str = "auto"  # cpu, cuda, cuda:N or auto: a GPU if any, and as many as the model needs
    dtype: Dtype = "auto"  # dtype of the computation; auto: float32 on a CPU, the model's own on a GPU


class TextSettings(TextFlags, OutputFlags):
    def read(self, files: Mapping[str, str]) -> dict[str, list[str]]:
        """Read the documents of texts, no more than are used, without those of `exclude`."""
        left_out = {text for path in self.exclude for text in read_documents(path)}
        most = self.max_tokens + len(left_out)
        texts = {name: read_documents(path, self.json_key, most) for name, path in files.items()}
        return {name: [text for text in its if text not in left_out] for name, its in texts.items()}


class RoutingFlags(TextFlags):
    """routers in closed form"""

    # most KL(base‖model) on text to keep, in nats per token (default: the best sum with the loss of expanded text)
    max_distance: Annotated[float | None, number(float, above=0), either("aim")] = None
    # instead, the fraction of what was learned for which the distance from the base is to be smallest
    keep: Annotated[float | None, number(float, above=0, most=1), either("aim")] = None


class RoutingSettings(RoutingFlags, TextSettings):
    pass


class MoeClassFlags(OutputFlags):
    """stock class"""

    # stock MoE class to write (default: the family's; docs/serving.md has the programs that read each)
    as_class: Annotated[str | None, choices(MOE_CLASSES), {"names": ["--as"]}] = None


class CombineSettings(RoutingSettings, MoeClassFlags):
    """combined model"""

    # model that was combined of this base: its experts and their routes stay, and --keep-text has their languages, too
    onto: HfFolder | None = None
    base_model: str | None = None  # name of the base on the Hub, for the card (default: BASE, or its folder's name)
    unchecked: bool = False  # write the model also if it is no better than the base, or texts cannot be told apart
    ignore_others: bool = False  # leave out what an expert changed besides its FFNs, and measure what that costs


def named_texts(items: Sequence[str], flag: str) -> dict[str, str]:
    """The files of a flag by name; without a name, each file is a text, named like it."""
    pairs = [
        pair
        for item in items
        for pair in ([item] if "=" in item else [f"{name}={path}" for name, path in named_files([item], flag).items()])
    ]
    return named_paths(pairs, flag)
