"""The results of a command: JSON, a page and tables on the terminal."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from moelpr.base.files import write_text
from moelpr.data.text.remote import shown
from moelpr.measure.evaluate.compare import Comparison
from moelpr.measure.report import page
from moelpr.measure.report.evaluation_files import EvaluationFile, ModelResult


class Results(ABC):
    """The measurements of a command, to be printed on the terminal and written to a folder."""

    name: str  # the files' name without suffix
    title: str

    @abstractmethod
    def numbers(self) -> Any:
        """All numbers: a record, or a dict of them."""

    def json_text(self, indent: int | None = None) -> str:
        """`numbers` as JSON; null for those that are infinite or NaN, such as those of a model that has diverged."""
        numbers = self.numbers()
        return TypeAdapter[Any](type(numbers)).dump_json(numbers, indent=indent, exclude_none=True).decode()

    @abstractmethod
    def findings(self) -> list[str]:
        """The findings, one sentence each."""

    @abstractmethod
    def tables(self) -> dict[str, page.Table]:
        """Title -> table."""

    def figures(self) -> list[page.Figure]:
        return []

    def samples(self) -> list[page.Block]:
        """Text written by the models."""
        return []

    def print(self) -> None:
        """Print tables and findings to stdout."""
        for title, table in self.tables().items():
            print("\n\n".join(part for part in (title, page.terminal_table(table), table.note) if part) + "\n")
        print("\n".join(self.findings()))

    def write(self, folder: Path) -> None:
        """Write NAME.json, NAME.md, NAME.html and each figure as SVG into `folder`, replacing existing files."""
        write_text(folder / f"{self.name}.json", self.json_text(indent=1) + "\n")
        findings: list[page.Block] = [page.Points(self.findings())] if self.findings() else []
        tables = [page.Section(title, [table]) for title, table in self.tables().items()]
        overview = page.Section("", [*findings, *self.figures()])
        continuations = page.Section("Continuations", self.samples())
        page.write_page(folder, self.name, page.Page(self.title, sections=[overview, *tables, continuations]))


def evaluation_file(
    models: dict[str, ModelResult],
    comparison: Comparison,
    data: Mapping[str, str],
    original: Sequence[str],
    settings: dict[str, Any],
) -> EvaluationFile:
    """The results of models with the settings and data that they are computed from."""
    texts = {language: shown(str(path)) for language, path in data.items()}
    return EvaluationFile(models, vars(comparison.settings) | settings, texts, original_languages=[*original])
