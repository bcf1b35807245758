"""The record of a graft: what was added to what."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moelpr.base.records import STRICT, Record
from moelpr.model.stages import Part

Only = Literal["all", "attention", "ffn"]
# The parts that get the difference; norms, embeddings and output layer only with "all".
PARTS: dict[Only, frozenset[Part]] = {
    "all": frozenset(Part),
    "attention": frozenset({Part.ATTENTION}),
    "ffn": frozenset({Part.DENSE_FFN, Part.ORIGINAL_EXPERTS, Part.NEW_EXPERTS}),
}


@dataclass(frozen=True, config=STRICT)
class Graft(Record):
    """The sum that a graft is: model + scale · (instruct − base).

    Attributes:
        base: Name of the dense base's folder, or its name on the Hub.
        instruct: Name of the model that post-training made of the base.
        model: Name of the model that was upcycled from the base.
        scale: Factor of the difference.
        only: The parts that get the difference.
    """

    FILE_NAME: ClassVar[str] = "graft.json"
    REMEDY: ClassVar[str] = "make the graft again with moelpr model graft"
    MISSING: ClassVar[str] = "is not a graft: it has no graft.json; moelpr model graft writes one"

    base: str
    instruct: str
    model: str
    scale: Annotated[float, Field(gt=0, lt=1e9)] = 1.0
    only: Only = "all"
