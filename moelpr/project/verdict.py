"""The end of a run in a few lines: the languages that were learned, those that were kept, and what follows from it."""

from collections.abc import Iterator, Sequence

from moelpr.base.languages import language_name
from moelpr.base.run_folder import BestStep
from moelpr.measure.report.evaluation_files import EvaluationFile
from moelpr.measure.report.findings import MOST_LOST
from moelpr.measure.report.numbers import Interval, percent
from moelpr.project.resolved import ResolvedProject

LEAST_LEARNED = 0.01  # a smaller gain is hardly one
_FEW = 20  # documents, of which figures are rough


def verdict(project: ResolvedProject) -> str:
    """The changes of bits per byte on held-out text against the base, a sentence on them, and the next command."""
    _, *results = EvaluationFile.read(project.evaluation / "results.json").models.items()
    by_model = {
        name: {code: result.languages[code].change["bits_per_byte"] for code in project.languages}
        for name, result in results
    }
    lines = ["", "Bits per byte on held-out text, against the base (lower is better):"]
    for name, changes in by_model.items():
        lines += [f"{name}:"] if len(by_model) > 1 else []
        for word, codes in (("learned", project.expanded), ("kept", project.original)):
            named = ", ".join(f"{language_name(code)} {_text(changes[code])}" for code in codes)
            lines.append(f"  {word + ':':<9}{named}")
    of_text = results[0][1].languages
    if few := [code for code in project.languages if (of_text[code].documents or _FEW) < _FEW]:
        lines.append(f"Rough figures, as few documents are held out: {_names(few)} (fewer than {_FEW}).")
    lines += _routers(project)
    for stage in project.parts:
        if (end := BestStep.read_if_there(project.folder / stage)) and end.made < end.planned:
            lines.append(
                f"Held-out text no longer improved: {stage} stopped after step {end.made:,} of {end.planned:,}, so "
                f"{1 - end.made / end.planned:.0%} of the steps were saved; step {end.step:,} is the result."
            )
    if project.why_reviewed:
        lines.append(f"A review followed, as the second FFN {project.why_reviewed}.")
    best = min(by_model, key=lambda name: sum(change.value for change in by_model[name].values()))
    lines += [f"{best} is the better one of the two, and what follows is about it."] if len(by_model) > 1 else []
    model = project.models.get(best, project.export)
    chat = project.folder / "chat" if project.content.chat and model == project.export else model
    unkept = _left_out(project, project.original) if model == project.export else []  # a review has other routers
    lacks = project.routed.shortcomings if project.routed and project.method == "second-ffn" else ""
    worse = project.routed.lost if project.routed and model == project.export else ""
    lines += [*_sentences(project, by_model[best], unkept, lacks, worse), "", f"model: {model}"]
    return "\n".join([*lines, f"report: {project.folder / 'report.html'}", f"next: moelpr chat {chat}"])


def _text(change: Interval) -> str:
    return percent(change.value) + ("" if _is_sure(change) else " (unclear)")


def _is_sure(change: Interval) -> bool:
    """Whether a change is clear; one of a single document has no interval."""
    return change.is_clear or not change.has_bounds


def _routers(project: ResolvedProject) -> Iterator[str]:
    """The figures of routers in closed form, and the worst text."""
    if (routed := project.routed) is None:
        return
    distances = {name: text.distance for name, text in routed.texts.items() if text.distance is not None}
    worst = max(distances, key=lambda name: distances[name])
    yield (
        f"Routers: {routed.kept:.0%} of what was learned is left, {routed.result.distance:.3f} nats per token from the "
        f"base on text to keep, most on {worst} ({distances[worst]:.3f})."
    )
    if left_out := _left_out(project, [*project.original, *project.kept]):
        yield f"Left out of the text to keep, as the base reads it like the new languages: {', '.join(left_out)}."


def _left_out(project: ResolvedProject, names: Sequence[str]) -> list[str]:
    """The texts of these that routers could not tell from the new languages."""
    return [name for name in names if project.routed and name not in project.routed.texts]


def _sentences(
    project: ResolvedProject, changes: dict[str, Interval], unkept: Sequence[str], lacks: str, worse: str
) -> Iterator[str]:
    unlearned = [code for code in project.expanded if changes[code].value >= 0 or not _is_sure(changes[code])]
    lost = [code for code in project.original if _is_sure(changes[code]) and changes[code].value > MOST_LOST]
    hardly = [code for code in project.expanded if code not in unlearned and changes[code].value > -LEAST_LEARNED]
    if unlearned:
        yield f"{_names(unlearned)}: not clearly learned; add text, or raise the budget."
    if hardly:
        yield f"{_names(hardly)}: hardly learned, by less than {LEAST_LEARNED:.0%}; raise the budget, or add text."
    if lost:
        has_review = project.why_reviewed if project.method == "auto" else project.replay
        remedy = "raise replay.original_documents" if has_review else "add such text under languages.kept"
        remedy = remedy if project.content.has_experts else "raise mix.replay"
        yield f"{_names(lost)}: lost by more than {MOST_LOST:.0%}; {remedy}."
    if unkept:
        yield f"{_names(unkept)}: not kept by the routers; add more or other text, or look at what has changed."
    if worse:
        yield worse
    if lacks:
        yield f"Hardly worth serving: the second FFN {lacks}; add text to keep, or set method: auto."
    elif not (unlearned or hardly or lost or unkept or worse):
        yield f"Worth serving: all new languages are learned, and none of the others is {MOST_LOST:.0%} worse."
        if len(project.expanded) > 1:
            least = max(project.expanded, key=lambda code: changes[code].value)
            yield f"More text of {language_name(least)} would help most."


def _names(codes: Sequence[str]) -> str:
    return ", ".join(map(language_name, codes))
