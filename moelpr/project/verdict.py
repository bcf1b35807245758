"""The end of a run in a few lines: the languages that were learned, those that were kept, and what follows from it."""

from collections.abc import Iterator, Sequence

from moelpr.base.languages import language_name
from moelpr.measure.report.evaluation_files import EvaluationFile
from moelpr.measure.report.numbers import Interval, percent
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.results import evaluation_folder

# The change of bits per byte from which on a language counts as lost.
MOST_LOST = 0.03


def verdict(project: ResolvedProject) -> str:
    """The changes of bits per byte on held-out text against the base, a sentence on them, and the next command."""
    *_, result = EvaluationFile.read(evaluation_folder(project) / "results.json").models.values()
    changes = {code: result.languages[code].change["bits_per_byte"] for code in project.languages}
    lines = ["", "Bits per byte on held-out text, against the base (lower is better):"]
    for word, codes in (("learned", project.expanded), ("kept", project.original)):
        lines.append(
            f"  {word + ':':<9}" + ", ".join(f"{language_name(code)} {_text(changes[code])}" for code in codes)
        )
    lines += [
        *_sentences(project, changes),
        "",
        f"model: {project.export}",
        f"report: {project.folder / 'report.html'}",
    ]
    return "\n".join(
        [*lines, f"next: moelpr chat {project.folder / 'chat' if project.content.chat else project.export}"]
    )


def _text(change: Interval) -> str:
    return percent(change.value) + ("" if change.is_clear else " (unclear)")


def _sentences(project: ResolvedProject, changes: dict[str, Interval]) -> Iterator[str]:
    unlearned = [code for code in project.expanded if changes[code].value >= 0 or not changes[code].is_clear]
    lost = [code for code in project.original if changes[code].is_clear and changes[code].value > MOST_LOST]
    if unlearned:
        yield f"{_names(unlearned)}: not clearly learned; add text, or raise the budget."
    if lost:
        remedy = "raise replay.original_documents" if project.replay else "add such text under languages.kept"
        remedy = remedy if project.content.has_experts else "raise mix.replay"
        yield f"{_names(lost)}: lost by more than {MOST_LOST:.0%}; {remedy}."
    if not unlearned and not lost:
        yield f"Worth serving: all new languages are learned, and none of the others is {MOST_LOST:.0%} worse."
        if len(project.expanded) > 1:
            least = max(project.expanded, key=lambda code: changes[code].value)
            yield f"More text of {language_name(least)} would help most."


def _names(codes: Sequence[str]) -> str:
    return ", ".join(map(language_name, codes))
