"""What the demo's report says: four models on held-out text, and whether each promise is kept."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from moelpr.languages import language_name
from moelpr.report.curves import Curve, column, line_chart, thinning_note
from moelpr.report.demo import (
    CHECK_LIMITS,
    MODELS,
    PROMISES,
    STAGES,
    EffectLine,
    Report,
    check_ok,
    effect_lines,
    failures,
    percent,
)
from moelpr.report.demo_pictures import MODEL_NAMES, headline_picture
from moelpr.report.document import (
    Block,
    Cell,
    Curves,
    Document,
    Facts,
    Picture,
    Row,
    Sample,
    Section,
    Table,
    Text,
    Verdict,
)
from moelpr.report.routing_picture import Panel, layer_names, routing_pictures, routing_table

CHECK_MEANINGS = {
    "upcycle_max_abs_logit_diff": "Upcycled model against its dense base, untrained: largest difference of a logit",
    "frozen_max_abs_diff": "Every frozen tensor after stage 2 against the base: largest difference of a weight",
    "export_max_abs_logit_diff": "Our model against stock transformers on the export: largest difference of a logit",
}
GROUP_TITLES = {"expanded": "Expanded languages", "original": "Original languages"}
RUN_NAMES = {"base": "Base", "full_finetune": "Full fine-tuning", "stage1": "Stage 1", "stage2": "Stage 2"}


def demo_document(report: Report, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> Document:
    """metrics: model -> records of its run's metrics.jsonl, for the curves."""
    caption = f"Change in bits per byte on held-out text against the base model. {_comparison(report)}"
    sections = [
        Section("", [Text(summary(report), "summary"), _verdict(report), Picture([headline_picture(report)], caption)]),
        Section("Bits per byte on held-out text", [_bits_table(report)]),
        Section("What was promised, line by line", [_effect_table(report)]),
        Section("Checks", [_checks_table(report)]),
        Section("Who answers: the original expert or a new one", _routing(report)),
        Section("Training", _curves(report, metrics)),
        Section("How each model goes on", _continuations(report)),
        Section("How it was made", [_facts(report)]),
    ]
    return Document(headline(report), report.title, sections)


def _comparison(report: Report) -> str:
    """What full fine-tuning was given, so that nobody has to believe that the comparison is fair."""
    full, stage1 = report.token_counts.get("full_finetune"), report.token_counts.get("stage1")
    amount = ""
    if full and stage1:
        amount = f", on {full:,} tokens" + (
            ", as many as stage 1" if full == stage1 else f" against {stage1:,} in stage 1"
        )
    return f"Full fine-tuning trained all weights of the base on the text of the expanded languages{amount}."


def headline(report: Report) -> str:
    """The page's first line; it claims the effect only where every line of it is shown."""
    missed, promised = len(failures(report)), len(effect_lines(report)) + len(CHECK_LIMITS)
    if missed:
        return (
            f"{promised - missed} of {promised} promised lines are shown, {missed} {'is' if missed == 1 else 'are'} not"
        )
    learned, kept = (_counted(len(report.group(group))) for group in ("expanded", "original"))
    return f"{learned.capitalize()} learned, {kept} kept"


def _counted(number: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return f"{words[number] if number < len(words) else number} language{'' if number == 1 else 's'}"


def summary(report: Report) -> str:
    """Two sentences that say what the numbers say, whichever way they went."""
    groups = [group for group in ("expanded", "original") if report.group(group)]
    ours, full = (
        {group: _amount(_mean_change(report, model, group)) for group in groups}
        for model in ("stage2", "full_finetune")
    )
    names = {group: _listed([language_name(language) for language in report.group(group)]) for group in groups}
    first = " and ".join(f"{ours[group]} in the {group} languages ({names[group]})" for group in groups)
    second = " and ".join(f"{full[group]} in the {group} ones" for group in groups)
    return (
        f"To predict text it has never seen, the model after both stages needs {first}, in bits per byte against the "
        f"base model it was made from. Fine-tuning the whole base model instead ends at {second}."
    )


def _amount(change: float) -> str:
    if not math.isfinite(change):
        return "an amount that was not measured"
    return f"{abs(100 * change):.1f}% {'less' if change < 0 else 'more'}"


def _mean_change(report: Report, model: str, group: str) -> float:
    base = report.mean_bits("base", group)
    return report.mean_bits(model, group) / base - 1 if base else math.nan


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _verdict(report: Report) -> Verdict:
    promised = len(effect_lines(report)) + len(CHECK_LIMITS)
    missed = failures(report)
    if not missed:
        details = f": {promised} of {promised} lines, each judged from the numbers below."
        return Verdict("This run shows everything that was promised", details)
    details = f": {promised - len(missed)} of {promised} lines are there, these are not."
    return Verdict("This run does not show everything that was promised", details, missed)


def _bits_table(report: Report) -> Table:
    rows = []
    for group, title in GROUP_TITLES.items():
        if not report.group(group):
            continue
        rows.append(Row([title], "group"))
        for language in report.group(group):
            values = {model: report.bits(model, language) for model in MODELS}
            rows.append(Row([language_name(language), *_bits_cells(values)]))
        means = {model: report.mean_bits(model, group) for model in MODELS}
        rows.append(Row(["mean", *_bits_cells(means)], "mean"))
    return Table(
        ["language", *(MODEL_NAMES[model] for model in MODELS)],
        rows,
        "How many bits the model needs for each byte of UTF-8 text: fewer means that it predicts the text better. With "
        "each number, its change against base. Each document stands alone; every token of it is predicted once.",
    )


def _bits_cells(values: Mapping[str, float]) -> list[Cell]:
    cells = []
    for model, value in values.items():
        if not math.isfinite(value):
            cells.append(Cell("not measured"))
        elif model == "base":
            cells.append(Cell(f"{value:.3f}"))
        else:
            change = value / values["base"] - 1
            cells.append(Cell(f"{value:.3f}", percent(change), change))
    return cells


def _effect_table(report: Report) -> Table:
    rows = []
    for name, title in PROMISES.items():
        lines = [line for line in effect_lines(report) if line.name == name]
        if lines:
            rows.append(Row([Cell(title, lines[0].wanted), [_found(line) for line in lines]]))
    return Table(["promised", "found, in bits per byte"], rows, text_columns=[1])


def _found(line: EffectLine) -> Cell:
    return Cell(f"{language_name(line.language)}: {line.found}", ok=line.ok)


def _checks_table(report: Report) -> Table:
    rows = []
    for name, limit in CHECK_LIMITS.items():
        value = report.checks.get(name, math.nan)
        found = f"{value:.2g}" if math.isfinite(value) else "not measured"
        wanted = "exactly 0" if limit == 0 else f"at most {limit:g}"
        rows.append(Row([CHECK_MEANINGS[name], Cell(found, ok=check_ok(name, value)), wanted]))
    return Table(["check", "found", "wanted"], rows)


def _routing(report: Report) -> list[Block]:
    panels = [
        Panel(MODEL_NAMES[stage].capitalize(), columns, rows)
        for stage in STAGES
        for columns, rows in [_shares(report, report.original_expert_share.get(stage) or {})]
        if columns
    ]
    caption = (
        "Share of held-out tokens whose highest router score is the original expert's, the frozen copy of the base "
        "model's own network. Review (stage 2) teaches the routers to send original-language text there."
    )
    return [Picture(routing_pictures(panels), caption, routing_table(panels))] if panels else []


def _shares(report: Report, shares: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, list[float]], list[str]]:
    """Language -> a share per layer and of all; names of these rows."""
    languages = [name for group in ("original", "expanded") for name in report.group(group) if name in shares]
    columns = {language_name(name): [*shares[name]["per_layer"], shares[name]["overall"]] for name in languages}
    if not columns:
        return {}, []
    first = shares[languages[0]]
    return columns, [*layer_names(first.get("layers", range(len(first["per_layer"])))), "all"]


def _curves(report: Report, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Block]:
    charts, drawn = [], []
    for model, name in RUN_NAMES.items():
        for title, curves, as_percent in _charts_of(model, metrics.get(model, [])):
            charts.append(line_chart(f"{name}: {title}", curves, as_percent=as_percent))
            drawn += curves
    charts = [chart for chart in charts if chart]
    missing = [MODEL_NAMES[model] for model in report.metrics if not metrics.get(model)]
    blocks: list[Block] = [Curves(charts, note=thinning_note(drawn))] if charts else []
    if missing:
        blocks.append(Text(f"No metrics were found for: {', '.join(missing)}.", "note"))
    return blocks


def _charts_of(model: str, records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Curve], bool]]:
    """Title, curves, whether they are shares; only what was logged is drawn."""
    groups = {"original": "original languages", "expanded": "expanded languages"}
    losses = [column(records, f"lm_loss_{group}", name) for group, name in groups.items()]
    if not all(curve.y for curve in losses):
        losses = [column(records, "lm_loss")]
    charts = [("next-token loss (nats per token)", losses, False)]
    if model == "stage1":
        charts.append(("balance loss", [column(records, "balance_loss")], False))
    if model == "stage2":
        shares = [column(records, f"original_first_share_{group}", name) for group, name in groups.items()]
        charts.append(("LPR loss", [column(records, "lpr_loss")], False))
        charts.append(("first choices that are the original expert", shares, True))
    return charts


def _continuations(report: Report) -> list[Block]:
    samples: list[Block] = []
    for group in GROUP_TITLES:
        for language in report.group(group):
            if language not in report.continuations:
                continue
            sample = report.continuations[language]
            texts = {MODEL_NAMES[model]: sample.by_model[model] for model in MODELS if model in sample.by_model}
            texts["the text itself"] = sample.reference
            samples.append(Sample(language, language_name(language), sample.prompt, texts))
    note = (
        "The first words of a held-out document, continued by each model. One sample a language shows the manner, not "
        "the quality; the numbers above do."
    )
    return [Text(note, "note"), *samples] if samples else []


def _facts(report: Report) -> Facts:
    return Facts(
        {
            "Training tokens": {MODEL_NAMES.get(run, run): f"{count:,}" for run, count in report.token_counts.items()},
            "Wall time": {
                MODEL_NAMES.get(step, step): duration(seconds) for step, seconds in report.wall_times_s.items()
            },
            "Settings": {name: str(value) for name, value in report.settings.items()},
            "Versions": report.versions,
        }
    )


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
