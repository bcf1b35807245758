"""The content of languages.yaml, as types: what a user decides about a model and its new languages.

Everything else has a default. `moelpr.project.reading` reads the file; the JSON schema that `moelpr init --schema`
prints is made from these types and their descriptions.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from moelpr.base.errors import UserError
from moelpr.base.languages import canonical
from moelpr.base.quantities import parse_count
from moelpr.base.records import DOCUMENTED
from moelpr.data.text.kept_languages import CODE, DECLARATIONS
from moelpr.data.text.sources import named_files
from moelpr.project.workflow.kubernetes import KubernetesSettings
from moelpr.project.workflow.skypilot import SkyPilotSettings
from moelpr.project.workflow.slurm import SlurmSettings

# Names that corpora and flags next to those of languages have.
_OTHER_NAMES = "original", "expanded", "kept", "replay"


def _short(key: str, *kinds: type) -> Callable[[Any], Any]:
    """Lets a value of these types stand for the settings of which it is the one with this key, and nothing for none."""
    return lambda value: {key: value} if isinstance(value, kinds) else {} if value is None else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


def _as_named(value: Any) -> Any:
    """Files without names are texts of their own, each named like the file; a folder or pattern stands for many.

    Text that is still to be fetched has no file.
    """
    if value == "auto":
        return dict.fromkeys((*DECLARATIONS, CODE), "")
    if value == "none":
        raise UserError("languages.kept must be files or auto, got none; to add no text, remove the key")
    paths = _as_list(value)
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return value
    files = [path for path in paths if path != "auto"]
    return (_as_named("auto") if "auto" in paths else {}) | (named_files(files, "languages.kept") if files else {})


def as_experts(value: Any) -> Any:
    """A word may stand for the experts, or their number."""
    words: dict[Any, Any] = {None: {}, "auto": {}, "per-language": {"per_language": True}}
    value = {"new": value} if type(value) is int else value
    return words.get(value, value) if value is None or isinstance(value, str) else value


def _or_none(value: Any) -> Any:
    return None if value == "none" else {} if value is None else value


def _as_count(value: Any) -> Any:
    return parse_count(str(value)) if isinstance(value, str | float) else value


Count = Annotated[int, BeforeValidator(_as_count, json_schema_input_type=int | str), Field(ge=1)]
Number = Annotated[float, Field(gt=0)]
OrAuto = BeforeValidator(lambda value: None if value == "auto" else value, json_schema_input_type=int | str | None)
Method = Literal["auto", "second-ffn", "review", "paper", "moe-lpr", "full", "ffn", "lora"]
# Ways to train, by the method and the keys that change it; "moe-lpr" has stages, "auto" has them if they are needed.
Way = Literal["auto", "second-ffn", "low-rank-ffn", "moe-lpr", "full", "ffn", "lora"]
# Method → the keys of `experts` that it sets, unless the file does.
PRESETS: dict[str, dict[str, int]] = {"auto": {"topk": 1}, "second-ffn": {"topk": 1}, "paper": {"new": 5, "copies": 1}}
Strings = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=list[str] | str)]
Flags = dict[str, bool | int | float | str | list[str | int | float]]


@dataclass(frozen=True, config=DOCUMENTED)
class Language:
    text: Strings = field(default_factory=list)
    """Files, folders, glob patterns or URIs (hf://, s3://, gs://, https://) of text: JSON lines or Parquet."""
    held_out: str | None = None
    """A file of text to evaluate on (default: held_out documents are taken out of the text)."""
    weight: Number | None = None
    """Share of stage 1's tokens, relative to the other languages' (default: mix.temperature decides)."""
    max_epochs: Number = 4.0
    """How often stage 1 may read the text; more often than 4 times teaches little more (arXiv 2305.16264)."""
    json_key: str = "text"
    """Key of the text in a document."""
    filter: str | None = None
    """Condition on the documents' keys or columns, such as language_score >= 0.9 (default: all)."""
    conversations: Strings = field(default_factory=list)
    """Files of conversations, lists of messages, on which the stage sft trains after stage 2 (default: none)."""


LanguageText = Annotated[
    Language, BeforeValidator(_short("text", str, list), json_schema_input_type=Language | list[str] | str)
]


@dataclass(frozen=True, config=DOCUMENTED)
class Languages:
    expanded: dict[str, LanguageText] = field(default_factory=dict)
    """The languages to add: code → text."""
    original: dict[str, LanguageText] = field(default_factory=dict)
    """The languages to keep: code → a little text. Code and mathematics too, under any name."""
    kept: Annotated[
        dict[str, str], BeforeValidator(_as_named, json_schema_input_type=dict[str, str] | list[str] | str)
    ] = field(default_factory=dict)
    """More text to keep, for calibrated routers: name → file, folder or pattern; without names, each file is a text.
    auto: a little text in a hundred languages, and code, which is fetched (moelpr data kept).
    [auto, FILE] adds more."""

    def __post_init__(self) -> None:
        names: dict[str, str] = {}
        for group in ("expanded", "original", "kept"):
            for name, text in [*getattr(self, group).items()]:
                # It becomes part of file names, lists and commands.
                if name in _OTHER_NAMES:
                    raise UserError(f"languages.{group} has {name}, which moelpr uses itself; give it another name")
                if not re.fullmatch(r"\w[\w.+ -]*", name):
                    raise UserError(f"languages.{group} has the name {name!r}; use letters, digits, and . + - _ within")
                place = names.get(code := canonical(name))
                if place and text:
                    raise UserError(f"the language {code} is given twice ({place} and {group}.{name}); remove one")
                if place:  # kept: auto lists it
                    del self.kept[name]
                elif group != "kept":
                    names[code] = f"{group}.{name}"
        if not self.expanded or not self.original:
            missing = "original" if self.expanded else "expanded"
            raise UserError(f"no {missing} language is given; add one under languages.{missing}, with its text")
        self._refuse_text_of_both_kinds()
        keys = {language.json_key for _, language in self}
        if self.kept and len(keys) > 1:
            raise UserError(
                f"languages.kept needs one json_key for all languages, not {' and '.join(sorted(keys))}; rename "
                "the key in one language's documents, or remove languages.kept"
            )

    def _refuse_text_of_both_kinds(self) -> None:
        def texts(group: str) -> Iterator[tuple[tuple[str, str, str | None], str]]:
            for name, one in getattr(self, group).items():
                yield from (((text, one.json_key, one.filter), f"{group}.{name}") for text in one.text)
                if group == "expanded" and one.held_out in one.text:
                    raise UserError(f"{one.held_out} is text and held_out of {group}.{name}; name another as held_out")

        new, key = dict[tuple[str, str, str | None], str](), next(iter(self.expanded.values())).json_key
        kept = (((text, key, None), f"kept.{name}") for name, text in self.kept.items() if text)
        for what, place in (*texts("expanded"), *texts("original"), *kept):
            if what in new:
                raise UserError(f"{what[0]} is the text of {new[what]} and of {place}; correct one of them")
            if place.startswith("expanded"):
                new[what] = place

    def __iter__(self) -> Iterator[tuple[str, Language]]:
        """Canonical code and settings, expanded languages first."""
        for group in (self.expanded, self.original):
            for name, language in group.items():
                yield canonical(name), language

    def codes(self, group: Literal["expanded", "original"]) -> list[str]:
        return [canonical(name) for name in getattr(self, group)]


@dataclass(frozen=True, config=DOCUMENTED)
class Mix:
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.3
    """A language's share of stage 1 is proportional to its tokens to this power: 0 for equal shares, 1 for its size."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of these tokens that is text of the original languages, mixed in (default: none)."""


@dataclass(frozen=True, config=DOCUMENTED)
class Budget:
    """The length of stage 1; one of the three."""

    tokens: Count | None = None
    """Tokens, such as 24B."""
    hours: Number | None = None
    """Hours on the hardware, by the predicted speed."""
    epochs: Number | None = None
    """Passes over the text of the expanded languages."""
    patience: Count | None = None
    """Tokens without a lower loss on held-out text after which it ends; the best saved step is the result."""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.tokens, self.hours, self.epochs)) != 1:
            raise UserError("budget needs exactly one of tokens, hours and epochs, such as tokens: 24B")
        if self.tokens and self.patience and self.patience >= self.tokens:
            raise UserError("budget.patience must be less than budget.tokens, or training never ends early; lower it")


@dataclass(frozen=True, config=DOCUMENTED)
class Replay:
    """The text of stage 2; documents per language, or all that there are."""

    original_documents: Count = 50_000
    """Documents of each original language (the paper's number)."""
    expanded_documents: Count = 100_000
    """Documents of each expanded language (the paper's number)."""
    epochs: Number = 1.0
    """Passes over the replay text."""


@dataclass(frozen=True, config=DOCUMENTED)
class Experts:
    new: Annotated[Count | None, OrAuto] = None
    """New experts per layer, or auto: the most that fit, up to 8, and 1 if a token chooses one."""
    topk: Count = 2
    """Experts that a token chooses; with 1, the new one trains as a dense model's FFN, and routers are found."""
    rank: Count | None = None
    """With topk: 1, train the new FFN as low-rank factors, by peft on one node (default: all its weights)."""
    copies: Count | None = None
    """Places of the original expert among them (default: as many as a token chooses)."""
    per_language: bool = False
    """With topk: 1, train an FFN for each expanded language, with the budget each (default: one for all)."""
    every_k_layers: Count | None = None
    """Upcycle every k-th layer only (default: every layer)."""

    def __post_init__(self) -> None:
        if self.topk == 1 and (self.new or 1) > 1:
            raise UserError(
                f"experts.new must be 1 with topk: 1, got {self.new}: choosing among several new experts is learned, "
                "and K = 1 gives routers no gradient; remove it, or set topk: 2"
            )
        for key in ("rank", "per_language") if self.topk > 1 else ():
            if getattr(self, key):
                raise UserError(
                    f"experts.{key} requires topk: 1, got {self.topk}; set method: second-ffn, or remove it"
                )
        if self.per_language and self.new:
            raise UserError(f"experts.new is a number for all languages, got {self.new} beside per_language; remove it")


@dataclass(frozen=True, config=DOCUMENTED)
class Lora:
    """Adapters of method lora."""

    rank: Count = 16
    """Rank."""
    alpha: Count | None = None
    """Numerator of their scale, alpha / rank (default: twice the rank)."""
    modules: Strings = field(default_factory=lambda: ["all-linear"])
    """Modules that get one, such as [q_proj, v_proj] (default: all linear layers but the output layer)."""


@dataclass(frozen=True, config=DOCUMENTED)
class Hardware:
    gpu: Annotated[str, BeforeValidator(_as_text)] = "auto"
    """Kind of GPU, such as h100-80 (moelpr layouts --help lists them), auto: this machine's, if any, or none: CPUs."""
    gpus: Annotated[Count | None, OrAuto] = None
    """Number of GPUs (default: those of this machine)."""
    gpus_per_node: Count = 8
    """GPUs of each node."""

    def __post_init__(self) -> None:
        if self.gpu == "none" and self.gpus:
            raise UserError(
                f"hardware.gpus must be left out with gpu: none, which is CPUs, got {self.gpus}; remove it, or name "
                "the kind, such as gpu: h100-80"
            )


@dataclass(frozen=True, config=DOCUMENTED)
class Vocabulary:
    new_tokens: Count
    """Tokens to add for the expanded languages; stage 0 then trains their rows."""
    stage0_tokens: Count | None = None
    """Tokens of text on which stage 0 trains (default: a tenth of stage 1's)."""


@dataclass(frozen=True, config=DOCUMENTED)
class Benchmarks:
    tasks: str | None = None
    """YAML table of benchmarks (default: the paper's)."""
    limit: Count | None = None
    """Examples per task (default: all)."""


@dataclass(frozen=True, config=DOCUMENTED)
class Trackers:
    """All steps log to one run, whose steps go on from stage to stage; TensorBoard files are always written."""

    wandb_project: str | None = None
    """Project of Weights & Biases."""
    wandb_entity: str | None = None
    """Its user or team."""
    mlflow_experiment: str | None = None
    """Experiment of MLflow, at the server that MLFLOW_TRACKING_URI names."""


@dataclass(frozen=True, config=DOCUMENTED)
class Corpora:
    """Tokenized corpora with language bits that exist already, as --data-path takes them; nothing is preprocessed."""

    stage1: Annotated[list[str | int | float], BeforeValidator(_as_list)]
    """Prefixes, or weights and prefixes; of another method its only text."""
    stage2: Annotated[list[str | int | float], BeforeValidator(_as_list)] = field(default_factory=list)
    """Prefixes, or weights and prefixes (required if there is a stage 2)."""


@dataclass(frozen=True, config=DOCUMENTED)
class Project:
    model: str
    """The dense base: a Hugging Face directory, or OWNER/NAME[@REVISION] on the Hub."""
    output: Annotated[str, Field(min_length=1)]
    """Folder for everything that is made."""
    languages: Languages
    """The languages to add and those to keep, with their text."""
    budget: Annotated[Budget, BeforeValidator(_short("tokens", str, int), json_schema_input_type=Budget | int | str)]
    """The length of stage 1, or of another method's training."""
    method: Method = "auto"
    """The method (default: a second FFN, and a review if its routers are of no use)."""
    text_output: str | None = None
    """Folder for corpora, held-out text and a downloaded base, which several projects share (default: output)."""
    mix: Mix = field(default_factory=Mix)
    """How the expanded languages share stage 1."""
    replay: Annotated[
        Replay | None, BeforeValidator(_or_none, json_schema_input_type=Replay | Literal["none"] | None)
    ] = field(default_factory=Replay)
    """The text of stage 2, or none: stage 1 trains new experts only, and calibrated routers replace stage 2."""
    held_out: Count = 500
    """Documents of each language to evaluate on, which nothing is trained on."""
    experts: Annotated[
        Experts, BeforeValidator(as_experts, json_schema_input_type=Experts | int | Literal["auto", "per-language"])
    ] = field(default_factory=Experts)
    """How the model grows, or the number of new experts, or auto, or per-language: a second FFN for each language."""
    lora: Lora = field(default_factory=Lora)
    """Rank and place of the adapters."""
    hardware: Annotated[Hardware, BeforeValidator(_short("gpu", str, int), json_schema_input_type=Hardware | str)] = (
        field(default_factory=Hardware)
    )
    """The GPUs to train on, or auto: this machine's."""
    vocabulary: Vocabulary | None = None
    """New tokens for the expanded languages (default: none)."""
    chat: str | None = None
    """The base after its post-training, directory or Hub name, whose difference makes the result a chat model."""
    chat_template: str | None = None
    """Folder of a chat model whose template the languages' conversations are written in (default: the base's own)."""
    benchmarks: Benchmarks | None = None
    """Benchmarks of lm-evaluation-harness, for base and result (default: none; requires the extra eval)."""
    trackers: Trackers = field(default_factory=Trackers)
    """Where metrics, settings, plan, evaluation and the report's pictures are logged."""
    corpora: Corpora | None = None
    """Corpora that exist already."""
    steps: dict[str, Flags] = field(default_factory=dict)
    """Flags of single steps, without dashes: step → flag → value."""
    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    """Settings of --on slurm."""
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)
    """Settings of --on kubernetes."""
    skypilot: SkyPilotSettings = field(default_factory=SkyPilotSettings)
    """Settings of --on skypilot."""

    def __post_init__(self) -> None:
        copies, topk = self.experts.copies, self.experts.topk
        if topk != 1 and self.method in ("auto", "second-ffn"):
            raise UserError(f"method: {self.method} has experts.topk: 1, got {topk}; remove it, or set method: review")
        if self.method in ("review", "paper") and topk == 1:
            raise UserError(f"method: {self.method} has no experts.topk: 1; remove it, or set method: second-ffn")
        if self.method in ("auto", "review", "paper") and self.replay is None:
            raise UserError(f"replay: none leaves out the review of method: {self.method}; remove it")
        if self.method == "auto" and (self.experts.rank or self.experts.per_language):
            key, what = ("rank", "no low-rank factors") if self.experts.rank else ("per_language", "one FFN for all")
            raise UserError(f"experts.{key} requires method: second-ffn, as review has {what}; set it")
        if self.languages.kept and copies is not None and copies < self.experts.topk:
            raise UserError(
                f"languages.kept needs as many copies of the original expert as a token chooses, {self.experts.topk}, "
                f"not {copies}; remove languages.kept, or set experts.copies: {self.experts.topk}"
            )

        if self.replay is None and not self.languages.kept:
            raise UserError(
                "replay: none leaves out stage 2, so routers need languages.kept: add text in other languages, code or "
                "dialogues, or remove replay"
            )
        needed = all if self.experts.per_language else any
        held_out_here = needed(not language.held_out for language in self.languages.expanded.values())
        if self.budget.patience and (self.corpora or self.way in ("lora", "low-rank-ffn") or not held_out_here):
            raise UserError(
                "budget.patience needs a stage on Megatron and a new language whose held-out text moelpr makes, so "
                "neither lora, nor experts.rank, nor corpora, nor held_out of each language; remove one of them"
            )
        if self.replay is None and any(language.conversations for _, language in self.languages):
            raise UserError("conversations need stage 2, which replay: none leaves out; remove one of them")

    @property
    def way(self) -> Way:
        if self.method in ("auto", "full", "ffn", "lora"):
            return self.method
        if self.experts.topk > 1:
            return "moe-lpr"
        return "low-rank-ffn" if self.experts.rank else "second-ffn"

    @property
    def has_experts(self) -> bool:
        return self.method not in ("full", "ffn", "lora")
