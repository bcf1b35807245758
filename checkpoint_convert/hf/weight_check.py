"""Checks that a Hugging Face directory contains exactly the tensors that its config.json describes."""

import math
from collections import Counter

from checkpoint_convert.hf.safetensors_reader import HfReader, is_unread
from moelpr.families.families import Family
from moelpr.families.tables import Piece, stacked_part, zeros
from moelpr.model_spec import ModelSpec
from moelpr.process.errors import UserError


def check_weights(source: HfReader, family: Family, base: ModelSpec, plan: list[Piece]) -> set[str]:
    """Check that a directory has exactly the tensors of `plan`, the pieces of the model `base`; return their names.

    Raises:
        UserError: A tensor is missing, misshapen, unknown or of another dtype.
    """
    known: set[str] = set()
    num_known: Counter[str] = Counter()  # elements of a stored tensor that are known
    for piece in plan:
        for names in piece.places:
            for name, shape in zip(names, piece.hf_shapes, strict=True):
                known.add(name)
                num_known[stacked_part(name)[0]] += math.prod(shape)
                if source.shape(name) != shape:
                    found = list(source.shape(name))
                    raise UserError(f"{source.folder}: {name} has shape {found}, but config.json says {list(shape)}")
                source.dtype(name)
    must_be_zero = {name for name, _ in zeros(family.table, base)}
    for name in source.names:
        if name in must_be_zero and source.read(name).any():
            raise UserError(f"{source.folder}: {name} must be zero, as a {family.name} model does not have it")
        if name not in must_be_zero and num_known[name] < math.prod(source.shape(name)) and not is_unread(source, name):
            raise UserError(
                f"{source.folder} contains the tensor {name}, which a {family.name} model with this config.json does "
                "not have, or not in this size; ignoring it would change the model"
            )
    return known
