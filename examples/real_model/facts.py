"""What the real model's corpus is."""

from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from moelpr.store.records import STRICT, Record


@dataclass(frozen=True, config=STRICT)
class Facts(Record):
    """The origin and the sizes of the real model's corpus, `facts.json` in its folder.

    Attributes:
        sources: Package -> its version, checksum, size and licence.
        trained: Kinds of text that are trained on.
        untrained: Kinds of text that are never trained on.
        languages: Language -> sizes of its parts, and how much of the held-out text is in the training text.
    """

    FILE_NAME: ClassVar[str] = "facts.json"
    REMEDY: ClassVar[str] = "remove its folder and rerun make results"
    INDENT: ClassVar[int | None] = 1

    sources: dict[str, Any]
    trained: list[str]
    untrained: list[str]
    languages: dict[str, Any]

    @property
    def kinds(self) -> list[str]:
        """All kinds of text, sorted."""
        return sorted((*self.trained, *self.untrained))
