"""What cleaning has kept and removed: counted by each task, and added up in a report."""

from dataclasses import field
from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass

from moelpr.languages import language_name
from moelpr.process.quantities import format_count
from moelpr.process.text_tables import table_text
from moelpr.store.records import STRICT, Record

EXAMPLES = 3  # a step and language
_SHOWN_CHARACTERS = 200
_PRINTED_CHARACTERS = 60
KEPT, ALL = "kept", "all"


def clipped(text: str, characters: int = _SHOWN_CHARACTERS) -> str:
    """The start of a text."""
    return text if len(text) <= characters else f"{text[:characters]}…"


@dataclass(frozen=True, config=STRICT)
class Example:
    """A document, by the start of its text.

    Attributes:
        source: File and line.
        why: What the step says about it; empty if nothing.
    """

    language: str
    source: str
    text: str
    why: str


@dataclass(frozen=True, config=STRICT)
class Amount:
    """How much text that is."""

    documents: int
    characters: int


@dataclass(frozen=True, config=STRICT)
class Tally(Record):
    """What one task, or all tasks, of a step have written.

    Attributes:
        languages: Amounts by language.
        examples: The first documents of each language.
    """

    FILE_NAME: ClassVar[str] = "tallies/STEP/RANK.json"

    languages: dict[str, Amount] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def add(self, language: str, characters: int, documents: int = 1) -> None:
        """Count documents."""
        before = self.of(language)
        self.languages[language] = Amount(before.documents + documents, before.characters + characters)

    def of(self, language: str) -> Amount:
        """The amount of a language, or of "all"."""
        if language != ALL:
            return self.languages.get(language, Amount(0, 0))
        amounts = self.languages.values()
        return Amount(sum(amount.documents for amount in amounts), sum(amount.characters for amount in amounts))

    @classmethod
    def read_all(cls, folder: Path) -> "Tally":
        """Add up what the tasks have counted, in their order."""
        total = cls()
        for path in sorted(folder.glob("*.json")):
            part = cls.read_file(path)
            for language, amount in part.languages.items():
                total.add(language, amount.characters, amount.documents)
            for example in part.examples:
                if sum(example.language == other.language for other in total.examples) < EXAMPLES:
                    total.examples.append(example)
        return total


@dataclass(frozen=True, config=STRICT)
class CleaningReport(Record):
    """What `moelpr data clean` has kept, and what each of its steps has removed.

    Attributes:
        settings: What the result depends on: inputs, flags and versions.
        kept: The cleaned text.
        removed: What each step has removed, in their order.
    """

    FILE_NAME: ClassVar[str] = "report.json"
    ASCII: ClassVar[bool] = False
    MISSING: ClassVar[str] = "has no report of a cleaning; pass the folder _removed that moelpr data clean has written"

    settings: dict[str, object]
    kept: Tally
    removed: dict[str, Tally]

    def text(self) -> str:
        """The report as a table of documents, and examples."""
        steps = {KEPT: self.kept, **self.removed}
        languages = sorted(
            {language for tally in steps.values() for language in tally.languages},
            key=lambda language: -sum(tally.of(language).documents for tally in steps.values()),
        )
        rows = []
        for language in [*languages, ALL]:
            found = [tally.of(language) for tally in steps.values()]
            total, characters = sum(amount.documents for amount in found), found[0].characters
            shares = [f"{amount.documents:,} ({amount.documents / max(total, 1):.1%})" for amount in found]
            name = ALL if language == ALL else f"{language} {language_name(language)}"
            rows.append([name, f"{total:,}", *shares, format_count(characters)])
        names = [step.replace("_", " ") for step in self.removed]
        head = ["documents", "read", KEPT, *names, "characters kept"]
        lines = [table_text(head, rows, indent="  ")]
        for step, tally in self.removed.items():
            for example in tally.examples[:EXAMPLES]:
                shown = clipped(" ".join(example.text.split()), _PRINTED_CHARACTERS)
                lines.append(f"  {step}: {example.source}: {shown}" + (f" ({example.why})" if example.why else ""))
        return "\n".join(lines)
