"""The page of the real model as Markdown and charts, from the numbers of `examples.real_model.measurements`."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.frontier_results import value_range
from examples.languages import GROUPS, LANGUAGES
from examples.real_model.measurements import collect, is_plain, is_short, missing
from examples.real_model.settings import (
    BLENDS,
    LORA_16,
    MORE_TEXT,
    NUM_NEW_TOKENS,
    REPLAY,
    SETTINGS,
    STAGE0_SHARE,
)
from examples.real_model.signs import Verdict, change, margin, signs
from examples.real_model.unseen_results import (
    HEAD,
    PLAIN_HEAD,
    collect_short,
    unseen_picture,
    unseen_tables,
    wrong_language_section,
)
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.languages import language_name
from moelpr.measure.report.numbers import Interval, percent
from moelpr.measure.report.page import Row, Table, markdown_table
from moelpr.measure.report.plots import Panel, Series, heat_maps, trade_off_chart

Json = Mapping[str, Any]
NAME, ROUTING, UNSEEN = "real-model", "real-model-routing", "unseen"  # files
SHORT, PLAIN = "unseen-short", "unseen-plain"  # files of short queues: the base, and that which has read plain text
COLUMNS = {SHORT: HEAD, PLAIN: PLAIN_HEAD}
PARTS = {"in": "trained kinds", "out": "other kinds"}
CONTINUED = {"base": "base", "copies-seed-1": "MoE-LPR, K copies", "full": "full fine-tuning", "lora": "LoRA"}
# Line of the chart -> its settings; only stages of the same training are joined.
CHART = {
    "MoE-LPR": {"stage 1": "copies-stage1", "stage 2": "copies"},
    "more text": {f"{times}× the tokens": name for name, times in MORE_TEXT.items()},
    "full fine-tuning": {"without replay": "full", "with replay text": REPLAY},
    "LoRA": {"largest rank": "lora", "rank 16": LORA_16},
}
JOINED = 1  # the first ones are joined by a line
FAR = 0.02, 0.13  # changes beyond which a setting is drawn at the chart's edge
_NUMBERS = re.compile(r"\[\s+(-?[\d.e-]+(?:,\s+-?[\d.e-]+)*)\s+\]")  # a list of numbers over several lines


def write_results(run: Path) -> None:
    """Write what is done as real-model.json, .md and .svg into the queue's folder; of a short one, unseen-short.*.

    Raises:
        UserError: Not even the base has been evaluated, or the text is missing or damaged.
    """
    if is_short(run):
        name = short_name(run)
        if not (found := collect_short(run)):
            raise UserError(f"{run} has no evaluation of the base; run make results first")
        write_text(run / f"{name}.json", dump(found))
        write_text(run / f"{name}.md", unseen_tables(found, COLUMNS[name]) + "\n")
        if found["settings"]:
            write_text(run / f"{name}.svg", unseen_picture(found) + "\n")
        return
    results = collect(run)
    write_text(run / f"{NAME}.json", dump(results))
    write_text(run / f"{NAME}.md", section(results) + "\n")
    for name, svg in charts(results).items():
        write_text(run / f"{name}.svg", svg + "\n")


def short_name(run: Path) -> str:
    """Name of the files of a short queue: one for each base."""
    return PLAIN if is_plain(run) else SHORT


def dump(results: Json) -> str:
    """JSON with one line per list of numbers."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    return _NUMBERS.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text) + "\n"


def charts(results: Json) -> dict[str, str]:
    """File name -> SVG."""
    found = {NAME: trade_off(results)} if results["settings"] else {}
    found |= {UNSEEN: unseen_picture(results["unseen"])} if results.get("unseen") else {}
    return found | ({ROUTING: routing_chart(results)} if results["routing"] else {})


def trade_off(results: Json) -> str:
    """Learning on trained kinds against forgetting on kinds never trained on, per setting and seed."""
    series = []
    for number, (name, members) in enumerate(CHART.items()):
        points = {
            label: [
                (model["means"]["in"]["expanded"][0], model["means"]["out"]["original"][0])
                for model in results["settings"][setting]["models"].values()
            ]
            for label, setting in members.items()
            if setting in results["settings"]
        }
        if points:
            series.append(Series(name, points, is_joined=number < JOINED))
    return trade_off_chart(
        "Learning and forgetting on a real model",
        series,
        x_axis="expanded languages, trained kinds of text: bits per byte against base",
        y_axis="original languages, other kinds (base: 0)",
        most=FAR,
    )


def routing_chart(results: Json) -> str:
    """First choices that are an original expert, per layer and language, after stage 1 and 2."""
    panels = [
        Panel(
            SETTINGS[name].label,
            {language_name(x): found["original_first_share"][x] for x in LANGUAGES},
            [str(layer) for layer in found["layers"]],
        )
        for name, found in results["routing"].items()
    ]
    title = "Fraction of first choices that are an original expert, kinds never trained on"
    return heat_maps(title, panels, form="{:.2f}", corner="layer")


def section(results: Json, images: str = "") -> str:
    """Markdown: predictions, then tables, charts, continuations and what is missing.

    Args:
        images: folder of the charts, with a slash at its end.
    """
    drawn = charts(results)
    parts = [
        _predictions(results),
        _means(results),
        f"![Learning and forgetting of every setting]({images}{NAME}.svg)" if NAME in drawn else "",
        _languages(results),
        _costs(results),
        _rates(results),
        f"![First choices that are an original expert]({images}{ROUTING}.svg)" if ROUTING in drawn else "",
        wrong_language_section(results.get("wrong_language", {}), CONTINUED),
        _continuations(results),
        _vocabulary(results),
        *(
            ["### What no replay text contains", unseen_tables(results["unseen"]), f"![]({images}{UNSEEN}.svg)"]
            if results.get("unseen")
            else []
        ),
        f"Not done yet: {'; '.join(not_done)}." if (not_done := missing(results)) else "",
    ]
    return "\n\n".join(part for part in parts if part)


def readme_table(results: Json) -> str:
    """What was done, and the means of MoE-LPR and of what it is compared with."""
    rows = []
    compared = {
        "copies": "MoE-LPR",
        "full": "full fine-tuning",
        "lora": "LoRA",
        REPLAY: "full fine-tuning with replay text mixed in",
    }
    for name, label in compared.items():
        learned, kept = change(results, name, "in", "expanded"), change(results, name, "out", "original")
        if learned is not None and kept is not None:
            rows.append([label, percent(learned), percent(kept)])
    text = textwrap.fill(
        "`make results` adds Greek, Hungarian and Turkish to a pretrained model, SmolLM2-135M-Instruct. Changes of "
        "bits per byte against it ([all settings](docs/results.md#on-a-real-language-model)):",
        width=120,
        break_long_words=False,
        break_on_hyphens=False,
    )
    head = ["lower is better", "expanded languages, kinds of text trained on", "original languages, another kind"]
    return f"{text}\n\n{markdown_table(Table(head, rows))}"


def _predictions(results: Json) -> str:
    found = signs(results)
    items = [f"- {sign.text}: {sign.verdict} ({sign.numbers})." for sign in found if sign.verdict != Verdict.MISSING]
    items += [f"- {sign.text}: {sign.verdict}." for sign in found if sign.verdict == Verdict.MISSING]
    title = (
        "What the paper would predict, and the bars of this comparison. Two settings that differ by less than "
        f"{100 * margin(results):.1f} points (what seeds of a setting differ by, at least 0.5) are too close to tell:"
    )
    return "\n".join([title, "", *items])


def _means(results: Json) -> str:
    columns = [(part, group) for part in PARTS for group in GROUPS]
    rows = [
        [
            setting["label"],
            *(_over_seeds([model["means"][p][g] for model in setting["models"].values()]) for p, g in columns),
        ]
        for setting in results["settings"].values()
    ]
    head = ["change against base", *(f"{group}, {PARTS[part]}" for part, group in columns)]
    kinds = results["kinds"]
    note = (
        f"Trained kinds of text: {', '.join(kinds['in'])}; other kinds: {', '.join(kinds['out'])}. In brackets: 95% "
        "intervals over documents, paired with base, translations drawn together; or for several seeds the lowest and "
        "highest of their means."
    )
    return f"{markdown_table(Table(head, rows))}\n\n{note}"


def _over_seeds(intervals: Sequence[Sequence[float]]) -> str:
    """One seed: the change with its interval. Several: their mean, lowest and highest."""
    if len(intervals) == 1:
        return Interval(*intervals[0]).text(percent)
    values = [value for value, *_ in intervals]
    return f"{percent(fmean(values))} ({value_range(values)})"


def _languages(results: Json) -> str:
    """A table per kind of text: bits per byte of base, and each setting's change."""
    tables = []
    for part, kinds in results["kinds"].items():
        for kind in kinds:
            rows: list[list[str]] = [["base, bits per byte"]]
            rows[0] += [f"{results['base'][f'{x}.{kind}'][0]:.3f}" for x in LANGUAGES]
            for setting in results["settings"].values():
                models = setting["models"].values()
                cells = [_over_seeds([model["change"][f"{x}.{kind}"] for model in models]) for x in LANGUAGES]
                rows.append([setting["label"], *cells])
            where = "trained" if part == "in" else "never trained on"
            head = [f"{kind} ({where})", *map(language_name, LANGUAGES)]
            tables.append(markdown_table(Table(head, rows)))
    return _folded("Each language and kind of text", *tables)


def _costs(results: Json) -> str:
    head = ["cost", "trained parameters", "differs from base, bf16", "tokens"]
    head += ["training", "peak memory", "learning rate"]
    rows = []
    for setting in results["settings"].values():
        if cost := setting["cost"]:
            millions, rates = cost["trained_parameters"] / 1e6, ", ".join(f"{rate:g}" for rate in cost["rates"])
            sizes = [f"{millions:.1f}M", f"{2 * millions:,.0f} MB", f"{cost['tokens']:,}"]
            rows.append([setting["label"], *sizes, _minutes(cost), f"{cost['peak_memory_gib']:.1f} GiB", rates])
    note = (
        "Training of the first seed, stage 1 included, on two cores, without starts, saves and searches: the median "
        "time of a step times their number. Times of different settings may be of different machines."
    )
    return f"{markdown_table(Table(head, rows))}\n\n{note}"


def _rates(results: Json) -> str:
    """The searches for learning rates."""
    items = []
    for setting in results["settings"].values():
        cost = setting["cost"]
        if "searched" in cost:
            tried = ", ".join(f"{rate} {percent(change)}" for rate, change in cost["searched"].items())
            edge = "; the best is at the edge of what was tried" if cost["is_at_edge"] else ""
            items.append(f"- {setting['label']}: {tried}{edge}.")
    title = (
        "Learning rates, each tried on a quarter of the tokens (mean change of the expanded languages on a validation "
    )
    return "\n".join([title + "part of the training text):", "", *items]) if items else ""


def _continuations(results: Json) -> str:
    """Per language, the prompts with each model's continuation side by side."""
    if not results["continuations"]:
        return ""
    models = list(next(iter(results["continuations"].values()))["by_model"])
    tables = []
    for language in LANGUAGES:
        rows = [
            Row([_cell(found["prompt"]), *(_cell(found["by_model"][model]) for model in models)])
            for name, found in results["continuations"].items()
            if name.split(".")[0] == language
        ]
        head = [f"{language_name(language)}: first words", *(CONTINUED.get(model, model) for model in models)]
        tables.append(markdown_table(Table(head, rows, text_columns=range(1, len(head)))))
    note = "Greedy continuations of held-out documents, up to 40 tokens. A few samples do not show quality."
    return _folded("Continuations", note, *tables)


def _folded(title: str, *parts: str) -> str:
    """A section that the reader opens."""
    return "\n\n".join([f"<details><summary>{title}</summary>", *parts, "</details>"])


def _cell(text: str) -> str:
    """Text that can stand in a Markdown table."""
    shown = " ".join(text.split())
    for character in "\\`*_<>|[]":
        shown = shown.replace(character, f"\\{character}")
    return shown


def _vocabulary(results: Json) -> str:
    """What new tokens change: bytes per token, and the same changes against base with and without them."""
    if not results["vocabulary"] or results["bytes_per_token"].keys() != {"base", "extended"}:
        return ""
    before, after = (results["bytes_per_token"][name] for name in ("base", "extended"))
    lengths = [
        [label, *(f"{found[x]:.2f}" for x in LANGUAGES)]
        for label, found in (("base", before), (f"{NUM_NEW_TOKENS:,} new tokens", after))
    ]
    columns = [(part, group) for part in PARTS for group in GROUPS]
    rows = []
    for setting in (results["settings"].get("copies"), *results["vocabulary"].values()):
        if setting:
            model, cost = next(iter(setting["models"].values())), setting["cost"]
            means = [_over_seeds([model["means"][part][group]]) for part, group in columns]
            label = setting["label"] + (", first seed" if len(setting["models"]) > 1 else "")
            rows.append([label, *means, f"{cost['tokens']:,}" if cost else "0", _minutes(cost) if cost else ""])
    head = ["change against base", *(f"{group}, {PARTS[part]}" for part, group in columns), "tokens", "training"]
    parts = sum(BLENDS["stage0"].values()) // BLENDS["stage0"]["original"]
    note = (
        f"{NUM_NEW_TOKENS:,} new tokens, learned from the training text; then stage 0 "
        f"with {STAGE0_SHARE:.0%} of the tokens, 1 in {parts} of them original; stage 1 with the others and "
        "`--train-new-embeddings`; and the same review. With the *same bytes*, stages 0 and 1 read as much text as "
        "stage 1 does without new tokens. With the *same tokens*, they take about the same time."
    )
    tables = [
        markdown_table(Table(["bytes per token, held-out text", *map(language_name, LANGUAGES)], lengths)),
        markdown_table(Table(head, rows)),
    ]
    return "\n\n".join(["### With an extended vocabulary", note, *tables])


def _minutes(cost: Json) -> str:
    return f"{cost['minutes']:.0f} min"
