"""report.html: one page, no script, nothing loaded from anywhere, fit to be printed."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from typing import Any

from moelpr.evaluate.languages import language_name
from moelpr.report.charts import MODEL_NAMES, headline_picture, heat_maps, training_charts
from moelpr.report.report import (
    CHECK_LIMITS,
    MODELS,
    PROMISES,
    Report,
    check_ok,
    effect_lines,
    failures,
    percent,
)
from moelpr.report.style import CSS

CHECK_MEANINGS = {
    "upcycle_max_abs_logit_diff": "Upcycled model against its dense base, untrained: largest difference of a logit",
    "frozen_max_abs_diff": "Every frozen tensor after stage 2 against the base: largest difference of a weight",
    "export_max_abs_logit_diff": "Our model against stock transformers on the export: largest difference of a logit",
}
GROUP_TITLES = {"expanded": "Expanded languages", "original": "Original languages"}


def build_page(report: Report, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The whole page. metrics: model -> records of its run's metrics.jsonl, for the curves."""
    sections = [
        f'<p class="kicker">{escape(report.title)}</p><h1>{escape(headline(report))}</h1>',
        f'<p class="summary">{escape(summary(report))}</p>',
        _verdict(report),
        f"<figure>{headline_picture(report)}<figcaption>Change in bits per byte on held-out text against the base "
        f"model. {_comparison(report)}</figcaption></figure>",
        "<h2>Bits per byte on held-out text</h2>",
        _bits_table(report),
        "<h2>What was promised, line by line</h2>",
        _effect_table(report),
        "<h2>Checks</h2>",
        _checks_table(report),
        _routing(report),
        _curves(report, metrics),
        _continuations(report),
        "<h2>How it was made</h2>",
        _facts(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


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


def _verdict(report: Report) -> str:
    promised = len(effect_lines(report)) + len(CHECK_LIMITS)
    missed = failures(report)
    if not missed:
        return (
            f'<div class="verdict"><b>This run shows everything that was promised</b>: {promised} of {promised} lines, '
            "each judged from the numbers below.</div>"
        )
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in missed)
    return (
        f'<div class="verdict missed"><b>This run does not show everything that was promised</b>: '
        f"{promised - len(missed)} of {promised} lines are there, these are not.<ul>{items}</ul></div>"
    )


def _bits_table(report: Report) -> str:
    head = "".join(f"<th>{MODEL_NAMES[model]}</th>" for model in MODELS)
    rows = []
    for group, title in GROUP_TITLES.items():
        if not report.group(group):
            continue
        rows.append(f'<tr class="group"><th colspan="{len(MODELS) + 1}">{title}</th></tr>')
        for language in report.group(group):
            values = {model: report.bits(model, language) for model in MODELS}
            rows.append(f"<tr><th>{escape(language_name(language))}</th>{_bits_cells(values)}</tr>")
        means = {model: report.mean_bits(model, group) for model in MODELS}
        rows.append(f'<tr class="mean"><th>mean</th>{_bits_cells(means)}</tr>')
    table = f"<table><thead><tr><th>language</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (
        f'<div class="scroll whole">{table}</div><p class="note">How many bits the model needs for each byte of UTF-8 '
        "text: fewer means that it predicts the text better. With each number, its change against base. Each document "
        "stands alone; every token of it is predicted once.</p>"
    )


def _bits_cells(values: Mapping[str, float]) -> str:
    cells = []
    for model, value in values.items():
        if not math.isfinite(value):
            cells.append("<td>not measured</td>")
            continue
        change = value / values["base"] - 1
        below = "" if model == "base" else f"<small>{percent(change)}</small>"
        tint = "" if model == "base" else f' style="background:{_tint(change)}"'
        cells.append(f"<td{tint}>{value:.3f}{below}</td>")
    return "".join(cells)


def _tint(change: float) -> str:
    """Green-blue for better, orange for worse, stronger up to 30%; the sign is printed, so colour is not needed."""
    if not math.isfinite(change):
        return "#ffffff"
    target = (38, 139, 120) if change < 0 else (222, 120, 40)
    strength = 0.5 * min(abs(change) / 0.3, 1.0) ** 0.7
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in target)


def _effect_table(report: Report) -> str:
    rows = []
    for name, title in PROMISES.items():
        lines = [line for line in effect_lines(report) if line.name == name]
        if not lines:
            continue
        found = "".join(
            f"<div>{_mark(line.ok)}<span>{escape(language_name(line.language))}: {escape(line.found)}</span></div>"
            for line in lines
        )
        rows.append(
            f'<tr><td class="text"><b>{title}</b><p class="note">{escape(lines[0].wanted)}</p></td>'
            f'<td class="text found">{found}</td></tr>'
        )
    head = '<th class="text">promised</th><th class="text">found, in bits per byte</th>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _mark(ok: bool) -> str:
    return '<span class="ok">✓ shown</span>' if ok else '<span class="no">✗ not shown</span>'


def _checks_table(report: Report) -> str:
    rows = []
    for name, limit in CHECK_LIMITS.items():
        value = report.checks.get(name, math.nan)
        found = f"{value:.2g}" if math.isfinite(value) else "not measured"
        rows.append(
            f'<tr><td class="text">{escape(CHECK_MEANINGS[name])}</td><td class="number">{found}</td>'
            f'<td class="number">{"exactly 0" if limit == 0 else f"at most {limit:g}"}</td>'
            f"<td>{_mark(check_ok(name, value))}</td></tr>"
        )
    head = '<th class="text">check</th><th>found</th><th>wanted</th><th></th>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _routing(report: Report) -> str:
    picture = heat_maps(report)
    if not picture:
        return ""
    return (
        "<h2>Who answers: the original expert or a new one</h2>"
        f"<figure>{picture}<figcaption>Share of held-out tokens whose highest router score is the original "
        "expert's, the frozen copy of the base model's own network. Review (stage 2) teaches the routers to send "
        "original-language text there.</figcaption></figure>"
    )


def _curves(report: Report, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    charts = training_charts(metrics)
    missing = [MODEL_NAMES[model] for model in report.metrics if not metrics.get(model)]
    note = f'<p class="note">No metrics were found for: {escape(", ".join(missing))}.</p>' if missing else ""
    if not charts:
        return f"<h2>Training</h2>{note}" if note else ""
    return (
        f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>'
        f'<p class="note">Faint: the steps themselves; strong: their running mean.</p>{note}'
    )


def _continuations(report: Report) -> str:
    samples = []
    for group in GROUP_TITLES:
        for language in report.group(group):
            if language not in report.continuations:
                continue
            sample = report.continuations[language]
            texts = {MODEL_NAMES[model]: sample.by_model[model] for model in MODELS if model in sample.by_model}
            texts["the text itself"] = sample.reference
            attributes = f'lang="{escape(language)}" dir="auto"'
            items = "".join(
                f"<dt>{escape(name)}</dt><dd {attributes}>{escape(text) or '<i>(nothing)</i>'}</dd>"
                for name, text in texts.items()
            )
            samples.append(
                f'<div class="sample"><h3>{escape(language_name(language))}</h3>'
                f'<p class="prompt" {attributes}>{escape(sample.prompt)} …</p><dl>{items}</dl></div>'
            )
    if not samples:
        return ""
    return (
        '<h2>How each model goes on</h2><p class="note">The first words of a held-out document, continued by each '
        f"model. One sample a language shows the manner, not the quality; the numbers above do.</p>{''.join(samples)}"
    )


def _facts(report: Report) -> str:
    blocks = {
        "Training tokens": {MODEL_NAMES.get(run, run): f"{count:,}" for run, count in report.token_counts.items()},
        "Wall time": {MODEL_NAMES.get(step, step): _duration(seconds) for step, seconds in report.wall_times_s.items()},
        "Settings": {name: str(value) for name, value in report.settings.items()},
        "Versions": report.versions,
    }
    sections = [
        f"<section><h3>{title}</h3>"
        + '<dl class="facts">'
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        + "</dl></section>"
        for title, facts in blocks.items()
        if facts
    ]
    return f'<div class="columns">{"".join(sections)}</div>'


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
