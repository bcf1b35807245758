"""Combine a dense base and models of which only the FFNs were trained to a stock MoE, in which a token uses one FFN."""

import copy
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic.dataclasses import dataclass as pydantic_dataclass
from safetensors import safe_open
from torch import Tensor, nn

from checkpoint_convert.card.front_matter import front_matter, inherited, plain, texts
from checkpoint_convert.card.model_card import INHERITED, joint_license
from checkpoint_convert.common.megatron_folder import MegatronReader
from checkpoint_convert.common.numbers import check_finite
from checkpoint_convert.common.output_folder import check_output, output_folder
from checkpoint_convert.common.settings import CombineSettings, MoeClassFlags
from checkpoint_convert.conversions.exported_model import class_for
from checkpoint_convert.conversions.model_pairs import Described, open_tensors, pieces_since
from checkpoint_convert.conversions.routed_model import RoutedModel, ffns_of
from checkpoint_convert.hf.checks import check_same_tokenizer, check_weights
from checkpoint_convert.hf.companions import write_companions
from checkpoint_convert.hf.model_files import DEFAULT_SHARD_BYTES, has_tokenizer
from checkpoint_convert.hf.safetensors_reader import HfReader, common_dtype
from checkpoint_convert.hf.safetensors_writer import Tensors, write_weights
from checkpoint_convert.hf.vocabulary_rows import tokenizer_folder
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError, first_line
from moelpr.base.records import FOREIGN, Record
from moelpr.measure.evaluate.calibration import Reader, Rows, Subject, calibrate
from moelpr.measure.evaluate.divergence import mean_loss
from moelpr.measure.evaluate.models import LoadedModel, open_model
from moelpr.model.families.families import Family, check_settings
from moelpr.model.families.hf_config import CONFIG_FILE, read_config
from moelpr.model.families.hub import is_hub_name
from moelpr.model.families.new_experts import NewExperts, with_new_experts
from moelpr.model.families.tables import pieces, stacked_part, zeros
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Part

_REMEDY = "pass what was trained from the base (of a project, OUTPUT/ffn-hf)"
_HALF = torch.bfloat16, torch.float16
_ADAPTER_FILE, _ADAPTER_PREFIX = "adapter_model.safetensors", "base_model.model."


@pydantic_dataclass(frozen=True, config=FOREIGN)
class _AdapterConfig(Record):
    """The fields of peft's adapter_config.json that decide what an adapter computes.

    Attributes:
        r: Rank.
        lora_alpha: Numerator of the scale.
        peft_type: Kind of adapter.
        use_rslora: Whether the scale is lora_alpha / √r, not lora_alpha / r.
        use_dora: Whether weights have magnitudes of their own.
        fan_in_fan_out: Whether weights are transposed.
        rank_pattern: Ranks of single modules.
        alpha_pattern: Numerators of single modules.
    """

    FILE_NAME: ClassVar[str] = "adapter_config.json"
    REMEDY: ClassVar[str] = "pass a LoRA adapter of peft"

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None


class AdapterReader:
    """The base with a LoRA adapter of peft merged: W + scale · B A."""

    FILES = (_AdapterConfig.FILE_NAME, _ADAPTER_FILE)

    def __init__(self, base: HfReader, folder: Path):
        self.folder, self.names, self._base = folder, base.names, base
        self._config = config = _AdapterConfig.read(folder)
        plain = config.peft_type == "LORA" and not (config.use_dora or config.fan_in_fan_out)
        try:
            with safe_open(folder / _ADAPTER_FILE, framework="pt") as file:
                factors = {name.removeprefix(_ADAPTER_PREFIX): file.get_tensor(name) for name in file.keys()}
        except Exception as error:  # safetensors raises an error of its own
            raise UserError(f"{folder / _ADAPTER_FILE} cannot be read ({first_line(error)}); copy it again") from error
        self._scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self._factors: dict[str, list[Tensor]] = {}
        for name in [name for name in factors if name.endswith(".lora_A.weight")]:
            module = name.removesuffix(".lora_A.weight")
            pair = factors.pop(f"{module}.lora_B.weight", None), factors.pop(name)
            fits = f"{module}.weight" in base and pair[0] is not None
            fits = fits and base.shape(f"{module}.weight") == (pair[0].shape[0], pair[1].shape[1])
            self._factors[f"{module}.weight"] = [*pair] if fits else []
        if not plain or config.rank_pattern or config.alpha_pattern or factors or not all(self._factors.values()):
            raise UserError(
                f"{folder} is not a plain LoRA of this base's linear layers; merge it (peft's merge_and_unload), and "
                "pass the merged model"
            )

    @property
    def changed(self) -> set[str]:
        """The names of the tensors that it changes."""
        return {name for name in self.names if stacked_part(name)[0] in self._factors}

    def copy(self, folder: Path) -> None:
        """Write the adapter, for any base of this shape."""
        self._config.write(folder)
        shutil.copyfile(self.folder / _ADAPTER_FILE, folder / _ADAPTER_FILE)

    def read(self, name: str) -> Tensor:
        tensor, (stored, index) = self._base.read(name), stacked_part(name)
        if stored not in self._factors:
            return tensor
        b, a = (factor.float() for factor in self._factors[stored])
        return (tensor.float() + self._scale * (b @ a)[index or ...]).to(tensor.dtype)


@dataclass(frozen=True)
class Base:
    """The dense base of experts."""

    described: Described
    tensors: HfReader
    ffn: list[str]  # names of the tensors of its FFNs; `others`: of all others
    others: list[str]

    @classmethod
    def open(cls, folder: Path, verify: Verify) -> Self:
        """Open it; UserError if it is not dense, or its weights are not those of its config.json."""
        described = Described.read(folder)
        if described.spec.moe is not None:
            raise UserError(f"{folder} is an MoE; pass the dense base of its experts")
        tensors, plan = HfReader(folder, verify=verify), list(pieces(described.family.table, described.spec))
        names = check_weights(tensors, described.family, described.spec, plan)
        ffn = [name for piece in plan if piece.part is Part.DENSE_FFN for name in piece.hf_names]
        return cls(described, tensors, ffn, sorted(names - {*ffn}))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, common_dtype((self.tensors, name) for name in self.tensors.names))
        return dtype


@dataclass(frozen=True)
class Expert:
    """A model that differs from the base in its FFNs."""

    folder: Path
    languages: list[str]
    tensors: HfReader | MegatronReader | AdapterReader
    others: list[str] = field(default_factory=list)  # the tensors in which it differs as well, which are left out
    names: Mapping[str, str] = field(default_factory=dict)  # name in the base → name here, if it is another

    def read(self, name: str) -> Tensor:
        return check_finite(self.tensors.read(self.names.get(name, name)), f"{self.folder}: {name}", _REMEDY)


class TopOne:
    """A dense model each of whose layers chooses between its FFN and those of experts, as the stock MoE does.

    Attributes:
        choice: The FFN that all tokens use, 0 for the base's; or the routers that decide, None for those of `put`.
    """

    def __init__(self, loaded: LoadedModel, base: Base, experts: Sequence[Expert]):
        self.choice: int | Rows | None = 0
        args = base.described.spec.megatron_args
        ffns = ffns_of(loaded, "", args["num_layers"], args["hidden_size"])
        self._loaded, self._ffns = loaded, ffns
        self._rows: Rows = {}
        names = {module: name for name, module in loaded.model.named_modules()}
        for layer, module in ffns.items():
            prefix = f"{names[module]}."
            others = [copy.deepcopy(module) for _ in experts]
            for expert, other in zip(experts, others, strict=True):
                _put(other, prefix, expert, (name for name in base.ffn if name.startswith(prefix)))
            module.forward = partial(self._forward, layer, [module.forward, *others])

    def put(self, rows: Rows) -> None:
        like = {layer: next(module.parameters()) for layer, module in self._ffns.items()}
        self._rows = {layer: rows_EH.to(like[layer]) for layer, rows_EH in rows.items()}

    def reader(self, choice: int | Rows | None, folder: Path) -> Reader:
        """The model with this choice."""

        def logits(tokens_BS: Tensor) -> Tensor:
            self.choice = choice
            return self._loaded.logits(tokens_BS)

        return Reader(replace(self._loaded, directory=folder, logits=logits), self._ffns)

    def _forward(self, layer: int, ffns: Sequence[Any], inputs: Tensor) -> Tensor:
        if isinstance(self.choice, int):
            return ffns[self.choice](inputs)
        rows_TH = inputs.flatten(0, -2)
        rows_EH = (self._rows if self.choice is None else self.choice)[layer]
        choice_T = (rows_TH @ rows_EH.to(rows_TH).T).argmax(-1)
        output_TH = torch.empty_like(rows_TH)
        for number, ffn in enumerate(ffns):
            if (is_its_T := choice_T == number).any():
                output_TH[is_its_T] = ffn(rows_TH[is_its_T])
        return output_TH.view_as(inputs)


def combine(
    base: Path,
    experts: Mapping[Path, list[str]],
    kept: Mapping[str, Sequence[str]],
    expanded: Mapping[str, Sequence[str]],
    settings: CombineSettings,
) -> RoutedModel:
    """Write the stock MoE of the base's FFN and those of experts, with routers in closed form.

    Args:
        experts: Folder of a model (Hugging Face directory, checkpoint or peft adapter) → its languages.
        kept: Name → documents whose tokens should stay with the base.
        expanded: Language → documents whose tokens should go to its expert.

    Raises:
        UserError: An expert does not fit the base, or a text the method; `settings.save` is then unchanged.
    """
    onto = settings.onto
    sources = [base, *experts, *([onto] if onto else [])]
    check_output(settings.save, sources, settings.overwrite, (RoutedModel.FILE_NAME,))
    opened_base = Base.open(base, settings.verify)
    stock_moe(opened_base, len(experts), settings.as_class)  # before it takes time
    before, old_rows, known = open_combined(opened_base, onto, settings.verify) if onto else ([], None, {})
    if unshown := {language for languages in known.values() for language in languages} - {*kept}:
        raise UserError(
            f"{onto} knows {min(unshown)}, of which there is no text to keep; pass --keep-text {min(unshown)}=FILE"
        )
    dropped, verify = settings.ignore_others, settings.verify
    opened = [open_expert(opened_base, folder, its, dropped, verify) for folder, its in experts.items()]
    with open_model(base, settings.device, settings.dtype, settings.verify) as loaded:
        model, places = TopOne(loaded, opened_base, [*before, *opened]), 1 + len(before)
        readers = [(model.reader(number, one.folder), one.languages) for number, one in enumerate(opened, start=places)]
        start = model.reader(0 if old_rows is None else old_rows, onto or base)
        routed = model.reader(None, settings.save)
        subject = Subject(start, routed, readers, model.put, places=places, old_rows=old_rows)
        rows, findings, held_out = calibrate(subject, kept, expanded, settings, is_checked=not settings.unchecked)
        ignored, languages_of = {}, languages_by_name(opened, known)
        for name, expert, (reader, languages) in zip(languages_of, opened, readers, strict=True):
            if expert.others:
                its = [ids for language in languages for ids in held_out[language]]
                _put(loaded.model, "", expert, expert.others)
                whole = mean_loss(reader.model, its)
                _put(loaded.model, "", opened_base.tensors, expert.others)
                ignored[name] = whole, mean_loss(reader.model, its)
    record = RoutedModel(settings.base_model or base.resolve().name, languages_of, findings, ignored, known)
    card = combined_card(base, [*before, *opened], known | languages_of, record.card_text(), settings.base_model)
    write_combined(opened_base, [*before, *opened], rows, card, record, settings)
    return record


def languages_by_name(experts: Sequence[Expert], others: Iterable[str] = ()) -> dict[str, list[str]]:
    """The languages of experts by the name of their folder, with which those of one name have their languages, too."""
    names = [*others, *(one.folder.resolve().name for one in experts)]
    return {
        f"{name} ({', '.join(one.languages)})" if names.count(name) > 1 else name: one.languages
        for name, one in zip(names[-len(experts) :], experts, strict=True)
    }


def write_combined(
    base: Base, experts: Sequence[Expert], rows: Rows, card: str, record: Record, output: MoeClassFlags
) -> None:
    """Write the stock MoE; tensors stream."""
    folder = base.described.folder
    family, spec = stock_moe(base, len(experts), output.as_class)
    shapes, reads = {}, {}
    for piece in pieces(family.table, spec):
        for name, shape, origin in zip(piece.hf_names, piece.hf_shapes, piece.origin or piece.hf_names, strict=True):
            shapes[name] = shape
            if piece.part is Part.ROUTER:
                reads[name] = partial(rows.__getitem__, int(name.split(".")[2]))
            else:
                is_new = piece.part is Part.NEW_EXPERTS
                reads[name] = partial((experts[(piece.expert or 0) - 1] if is_new else base.tensors).read, origin)
    extra = dict(zeros(family.table, spec))
    reads |= {name: partial(torch.zeros, shape) for name, shape in extra.items()}
    written = Tensors(shapes | extra, lambda name: reads[name]())
    sources, norms = [folder, *(one.folder for one in experts)], [rows_EH.norm().item() for rows_EH in rows.values()]
    num_bytes = written.num_bytes(base.dtype)
    with output_folder(output.save, output.overwrite, num_bytes, sources, rows=norms) as (partial_folder, journal, bar):
        config = family.export_config(read_config(folder), spec, str(base.dtype).removeprefix("torch."))
        write_companions(partial_folder, folder, config, card)
        record.write(partial_folder)
        write_weights(journal, written, base.dtype, DEFAULT_SHARD_BYTES, bar)


def stock_moe(base: Base, num_experts: int, as_class: str | None) -> tuple[Family, ModelSpec]:
    """The model of a base and experts; UserError if the class of this name cannot hold it exactly."""
    family = base.described.family
    spec = with_new_experts(family, base.described.spec, NewExperts(num_experts, topk=1, original_copies=1))
    return family.written_as(class_for(spec, as_class, base.described.folder)) if as_class else family, spec


def open_combined(base: Base, folder: Path, verify: Verify) -> tuple[list[Expert], Rows, dict[str, list[str]]]:
    """The experts of a model that was combined of a base, its routers, and the languages of each expert.

    Raises:
        UserError: It is another model, or one of another base.
    """
    theirs = Described.read(folder)
    if theirs.spec.moe is None or theirs.spec.moe.topk != 1:
        raise UserError(f"--onto {folder} is no model of moelpr model combine, in which a token uses one FFN")
    if (folder / "packs.json").is_file():
        raise UserError(f"--onto {folder} is built of packs; build it again with one pack more (moelpr pack build)")
    record = RoutedModel.read(folder)
    moe_class, plan = pieces_since(base.described, theirs)
    tensors, names, rows = open_tensors(folder, moe_class, verify), dict[int, dict[str, str]](), dict[int, Tensor]()
    for piece in plan:
        for name, origin in zip(piece.hf_names, piece.origin or piece.hf_names, strict=True):
            if piece.part is Part.ROUTER:
                rows[int(name.split(".")[2])] = tensors.read(name).float()
            elif piece.part is Part.NEW_EXPERTS:
                names.setdefault(piece.expert or 0, {})[origin] = name
            elif not torch.equal(base.tensors.read(origin), tensors.read(name)):
                raise UserError(f"--onto {folder} has another {name} than {base.described.folder}; pass its own base")
    known = record.onto | record.experts
    experts = [
        Expert(folder, languages, tensors, names=names[number])
        for number, languages in enumerate(known.values(), start=1)
    ]
    return experts, rows, known


def open_expert(base: Base, folder: Path, languages: list[str], ignore_others: bool, verify: Verify) -> Expert:
    """Open an expert.

    Raises:
        UserError: It is no model of the base's shape and tokenizer, its FFNs are the base's, or it differs in more
            than the FFNs and `ignore_others` is not set.
    """
    ours, source = base.described, base.tensors
    tensors: HfReader | MegatronReader | AdapterReader
    is_adapter = (folder / _AdapterConfig.FILE_NAME).is_file() and not (folder / CONFIG_FILE).is_file()
    if is_adapter:
        tensors = AdapterReader(source, folder)
    else:
        if (spec := Described.read(folder).spec).moe is not None:
            raise UserError(f"{folder} is not {ours.folder} with other FFNs: it is an MoE; {_REMEDY}")
        check_settings(ours.folder, ours.spec, folder, spec, _REMEDY)
        tensors = open_tensors(folder, verify=verify)
        if isinstance(tensors, HfReader):
            check_weights(tensors, ours.family, ours.spec, list(pieces(ours.family.table, ours.spec)))
    if has_tokenizer(tokenizer := tokenizer_folder(folder)) or not is_adapter:
        check_same_tokenizer(ours.folder, tokenizer, tokenizer, ours.spec.megatron_args["vocab_size"], range(0))

    # Training may have rounded it, whatever the dtype in which it was written again.
    def is_base(before: Tensor, its: Tensor) -> bool:
        return any(torch.equal(before.to(dtype).to(its.dtype), its) for dtype in (its.dtype, *_HALF))

    if all(is_base(source.read(name), tensors.read(name)) for name in base.ffn):
        raise UserError(f"{folder} has the FFNs of {ours.folder}, so nothing was learned; {_REMEDY}")
    changed: dict[str, float] = {}
    for name in base.others:
        its, before = tensors.read(name), source.read(name)
        if not is_base(before, its):
            size = before.float().norm() or its.float().norm()
            changed[name] = ((its.float() - before.float()).norm() / size).item()
    if changed and not ignore_others:
        worst = max(changed, key=lambda name: changed[name])
        raise UserError(
            f"{folder} differs from {ours.folder} in {len(changed)} of {len(base.others)} tensors outside its FFNs, "
            f"most in {worst} (by {changed[worst]:.2%}); train the FFNs only, or combine with --ignore-others"
        )
    return Expert(folder, languages, tensors, [*changed])


def _put(module: nn.Module, prefix: str, tensors: Any, names: Iterable[str]) -> None:
    """Give the parameters of a module the values of tensors."""
    for name in names:
        stored, index = stacked_part(name)
        module.get_parameter(stored.removeprefix(prefix)).data[index or ...] = tensors.read(name)


def combined_card(
    base: Path, experts: Sequence[Expert], named: Mapping[str, list[str]], routers: str, base_model: str | None = None
) -> str:
    """README.md of a combined model, with a section on its routers; `named` has the languages of each expert."""
    cards = [inherited(folder, (*INHERITED, "base_model")) for folder in (base, *(one.folder for one in experts))]
    base_model = base_model or next(filter(is_hub_name, (str(card.get("base_model")) for card in cards[1:])), None)
    name = plain(base_model) or base.resolve().name
    listed = "; ".join(f"`{expert}` for {', '.join(languages)}" for expert, languages in named.items())
    head = front_matter(
        base_model=base_model if base_model and is_hub_name(base_model) else None,
        language=[*dict.fromkeys(sum(named.values(), texts(cards[0].get("language"))))],
        **joint_license(*(card for card in cards if "license" in card)),  # a trainer may write no card
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["moe", "moe-lpr", "merge"],
    )
    return (
        f"---\n{head}---\n\n# {name} with {len(experts)} more FFN{'s' * (len(experts) > 1)} per layer\n\n"
        f"Expert 0 of each layer is the FFN of `{name}`, the others are those of {listed}. "
        "A token uses one of them; everything else is the base's. A stock class: no custom code.\n\n"
        f"{routers}## Use\n\nLoad it with transformers as any model.\n"
    )
