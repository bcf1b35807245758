"""Open two models of which one was made from the other, and pairs their tensors."""

from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint_convert.common.megatron_folder import MegatronReader
from checkpoint_convert.hf.safetensors_reader import HfReader, is_unread
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.measure.evaluate.models import is_megatron
from moelpr.model.families.families import Family, family_named, read_base
from moelpr.model.families.hf_config import read_config
from moelpr.model.families.moe_classes import MOE_CLASSES, MoeClass
from moelpr.model.families.tables import Piece, pieces
from moelpr.model.model_spec import ModelSpec


def moe_class_of(model: Path) -> MoeClass | None:
    """The MoE class of a Hugging Face directory; None for a dense model or a checkpoint."""
    architectures = [] if is_megatron(model) else read_config(model).get("architectures")
    return next((kind for kind in MOE_CLASSES.values() if [kind.architecture] == architectures), None)


def open_tensors(
    model: Path, moe_class: MoeClass | None = None, verify: Verify = Verify.FULL
) -> HfReader | MegatronReader:
    """A reader of the model, without the tensors that readers ignore.

    Args:
        moe_class: Whose names the tensors of a checkpoint get, if it can hold them.
    """
    if is_megatron(model):
        is_held = moe_class is not None and moe_class.misfit(ModelSpec.read(model)) is None
        return MegatronReader(model, moe_class=moe_class if is_held else None, verify=verify)
    is_tied = read_config(model).get("tie_word_embeddings", False)
    reader = HfReader(model, verify=verify)
    reader.names = [
        name for name in reader.names if (name == "lm_head.weight" and not is_tied) or not is_unread(reader, name)
    ]
    return reader


@dataclass(frozen=True)
class Described:
    """A Hugging Face directory or a checkpoint folder, and its description."""

    folder: Path
    family: Family
    spec: ModelSpec

    @classmethod
    def read(cls, folder: Path) -> "Described":
        """Read config.json or model_spec.json; UserError if it describes no supported model."""
        if not is_megatron(folder):
            return cls(folder, *read_base(folder))
        spec = ModelSpec.read(folder)
        return cls(folder, family_named(spec.family), spec)


def pieces_since(base: Described, upcycled: Described) -> tuple[MoeClass, list[Piece]]:
    """The pieces of an upcycled model; what was made of the base, in one round or several, has its origin there.

    Returns:
        The MoE class whose names the pieces have, and the pieces.

    Raises:
        UserError: the base has no fewer experts, or both are Hugging Face models of different MoE classes.
    """
    family, spec, base_spec = upcycled.family, upcycled.spec, base.spec
    if base_spec.moe is None:
        family = base.family.written_as(family.moe_class)  # its MoE class alone knows the dense model's names
    elif is_megatron(upcycled.folder):
        family = family.written_as(base.family.moe_class)  # the checkpoint takes the base's names
    elif not is_megatron(base.folder):
        first, second = (kind.moe_class.architecture for kind in (base.family, family))
        if first != second:
            raise UserError(
                f"{base.folder} is a {first} and {upcycled.folder} a {second}, which join tensors differently; export "
                "the latter again with moelpr model export --as and the base's class, or pass its checkpoint folder"
            )
    num_places = base_spec.moe.num_experts if base_spec.moe else 1
    num_experts = spec.moe.num_experts if spec.moe else 1
    if spec.moe is None or num_experts <= num_places:
        raise UserError(
            f"{base.folder} is not the base of {upcycled.folder}: it must have fewer experts, got {num_places} and "
            f"{num_experts}; pass the base first and the upcycled model second"
        )
    copies = spec.moe.original_copies if base_spec.moe is None else 1  # every expert of an MoE is in it by its own name
    num_new = num_experts - copies - (num_places - 1)
    moe = replace(spec.moe, num_original_experts=num_places, original_copies=copies, num_new_experts=num_new)
    return family.moe_class, list(pieces(family.table, replace(spec, moe=moe)))
