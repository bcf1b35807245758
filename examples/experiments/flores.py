"""Tables on FLORES-101, sentences in 101 languages that people translated, on which nothing here trains.

All languages; mixed text, whose two sides count apart; and translation without generation. And one on MultiBLiMP,
sentences next to the same with a wrong verb.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import batched
from pathlib import Path

import numpy as np

from examples.experiments.parts import KEPT, NEW, ORACLE, UNCOUNTED, Scores, Texts, against_base, score_of, without_seed
from examples.languages import EXPANDED, LANGUAGES
from moelpr.base.errors import UserError
from moelpr.base.languages import canonical, language_name
from moelpr.measure.evaluate.confidence import Estimate, estimates, interval_of, mean
from moelpr.measure.evaluate.wrong_language import wilson
from moelpr.measure.report.numbers import Interval, percent
from moelpr.measure.report.page import Table
from moelpr.measure.report.plots import learned_lost_chart

# Its names that are no codes of languages.
CODES = {"zho_simpl": "zh", "zho_trad": "zh-Hant"}
SENTENCES = 40  # per language, a multiple of FOUR
RELATIVES = {"hu": ("fi", "et"), "tr": ("az", "uz", "kk"), "nl": ("de", "da"), "cs": ("pl", "sk"), "et": ("fi",)}
MIXED, BLOCK_LINES = 60, 8  # documents of each kind of mixed text; lines of code between comments
FOUR = 4  # sources of which one is right
PAIRS = 500  # per language
LABELS = {"-ffn": " FFN", "full-pack": "full fine-tuning", "lora-alone": "LoRA", "-routers": "'s routers"}  # in charts
Sentences = Mapping[str, Sequence[str]]  # language → sentences, the same in each


def read_flores(flores: Path, languages: Sequence[str] = ("",)) -> dict[str, list[str]]:
    """Language → the lines with odd numbers, as those with even ones are for choosing: of all languages, or of some.

    Raises:
        UserError: There is no data set, or its files are not parallel.
    """
    sentences = {file.stem: file.read_text("utf-8").splitlines() for file in sorted(flores.glob("dev/*.dev"))}
    if len({len(lines) for lines in sentences.values()}) != 1:
        what = "files of other lengths" if sentences else "no files"
        raise UserError(f"{flores}/dev has {what} *.dev; pass the folder of FLORES-101, which has dev/eng.dev")
    found = {canonical(CODES.get(code, code)): lines[1::2] for code, lines in sentences.items()}
    return {code: found[code] for code in (*LANGUAGES, *languages) if code in found} if any(languages) else found


def read_pairs(folder: Path) -> dict[str, list[str]]:
    """Language → sentences of MultiBLiMP, each before the same with a verb that does not agree.

    Raises:
        UserError: There is no data set.
    """
    found = {}
    for file in sorted(folder.glob("*/data.tsv")):
        with open(file, encoding="utf-8", newline="") as lines:
            rows = [*csv.DictReader(lines, delimiter="\t")]
        chosen = [rows[n * len(rows) // PAIRS] for n in range(PAIRS)] if len(rows) > PAIRS else rows
        found[canonical(file.parent.name)] = [row[key] for row in chosen for key in ("sen", "wrong_sen")]
    if not found:
        raise UserError(f"{folder} has no LANGUAGE/data.tsv; pass the folder of MultiBLiMP, with tur/data.tsv")
    return found


def in_all_languages(sentences: Sentences, _: object, new: Iterable[str] = EXPANDED, most: int = SENTENCES) -> Texts:
    sides = {language: NEW if language in new else KEPT for language in sentences}
    return {language: [[(sides[language], line)] for line in lines[:most]] for language, lines in sentences.items()}


def _by_language(scores: Scores) -> tuple[dict[str, dict[str, dict[str, Estimate]]], list[str]]:
    """The estimates of each text, and the texts in a new language."""
    texts = next(iter(scores.values())).items()
    new = [text for text, its in texts if NEW in its]
    return {text: against_base(scores, text, next(iter(its))) for text, its in texts}, new


def all_languages_table(scores: Scores) -> Table:
    (of, new), rows = _by_language(scores), []
    texts, others = [*of], [text for text in of if text not in new]
    relatives = [one for text in new for one in RELATIVES.get(text, ()) if one in others]
    for model in _models(scores):
        changes = {text: of[text][model]["change"] for text in texts}
        worst = sorted(others, key=lambda text: -changes[text][0])[:3]
        named = [", ".join(f"{language_name(x)} {percent(changes[x][0])}" for x in its) for its in (worst, relatives)]
        learned, kept = (_mean((changes[text] for text in its), percent) for its in (new, others))
        rows.append([model, learned, kept, _mean(of[text][model]["distance"] for text in others), *named])
    head = ["change of bits per byte", "learned", f"{len(others)} other languages", "their KL", "worst", "relatives"]
    return Table(head, rows)


def all_languages_chart(scores: Scores) -> str:
    of, new = _by_language(scores)

    def point(model: str) -> tuple[Interval, Interval]:
        learned = mean([of[text][model]["change"] for text in new])
        return interval_of(learned), interval_of(mean([of[x][model]["distance"] for x in of if x not in new]))

    models = [model for model in _models(scores) if not model.endswith(ORACLE)]  # a detector hardly errs here
    panels = {"KL of other languages, nats per token": {_label(model): point(model) for model in models}}
    return learned_lost_chart("Learned, and how far from the base", panels, x_axis="learned", y_text="{:.2f}".format)


def _models(scores: Scores) -> list[str]:
    """All but the base, with their seeds as one."""
    return [*dict.fromkeys(map(without_seed, scores))][1:]


def _label(model: str) -> str:
    for name, label in LABELS.items():
        model = model.replace(name, label)
    return model


def mixed(sentences: Sentences, code: Iterable[str]) -> Texts:
    """Kind → documents with a side to keep, English or Python, and one in a new language."""
    en, el, hu, tr = (sentences[language] for language in ("en", "el", "hu", "tr"))
    alternating = []
    for n in range(MIXED):
        sides = [(NEW, sentences[EXPANDED[n % 3]]), (KEPT, en)][:: (-1) ** n]
        first = 4 * (MIXED + n)
        alternating.append([(what, f"{its[first + k]}\n") for k, (what, its) in enumerate(2 * sides)])
    files = [document.splitlines(keepends=True) for document in code]
    blocks = ["".join(x[k : k + BLOCK_LINES]) for x in files for k in range(0, len(x) - BLOCK_LINES, BLOCK_LINES)]
    commented = [[(NEW, f"# {comment}\n"), (KEPT, block)] for comment, block in zip(hu, blocks, strict=False)]
    return {
        "English request, Greek answer": [
            [(KEPT, f"Translate this sentence into Greek: {en[n]}\n"), (NEW, el[n])] for n in range(MIXED)
        ],
        "English document, then Turkish": [
            [(KEPT, " ".join(en[n : n + 3]) + "\n"), (NEW, tr[n + 1])] for n in range(MIXED, 4 * MIXED, 3)
        ],
        "sentences that alternate": alternating,
        "code, Hungarian comments": [one + other for one, other in batched(commented[: 2 * MIXED], 2)],
    }


def mixed_table(scores: Scores) -> Table:
    kinds, rows = [*next(iter(scores.values()))], []
    of = {(kind, what): against_base(scores, kind, what) for kind in kinds for what in (KEPT, NEW)}
    for model in _models(scores):
        nats = [of[kind, KEPT][model]["distance"] for kind in kinds]
        changes = [of[kind, NEW][model]["change"] for kind in kinds]
        pairs = zip(nats, changes, strict=True)
        rows.append([model, _mean(nats), _mean(changes, percent), *(f"{a[0]:.3f} / {percent(b[0])}" for a, b in pairs)])
    return Table(["mixed text", "KL, kept side", "bits per byte, new side", *kinds], rows)


def with_sources(sentences: Sentences, code: Iterable[str]) -> Texts:
    """Language → each sentence after each of four English ones, of which it translates one."""
    en = sentences["en"]
    return {
        language: [
            [(UNCOUNTED, f"{en[n - n % FOUR + k]}\n"), (NEW, sentences[language][n])]
            for n in range(SENTENCES)
            for k in range(FOUR)
        ]
        for language in EXPANDED
    }


def translation_table(scores: Scores) -> Table:
    table = []
    for model, of in scores.items():
        saved, right = [], 0
        for language in EXPANDED:
            rows = of[language][NEW].reshape(SENTENCES, FOUR, -1)
            numbers, own = np.arange(SENTENCES), np.arange(SENTENCES) % FOUR
            after = {"own": rows[numbers, own], "other": (rows.sum(1) - rows[numbers, own]) / (FOUR - 1)}
            found = estimates({name: score_of(one) for name, one in after.items()}, seed=1)
            saved.append(found["other"]["bits_per_byte"] - found["own"]["bits_per_byte"])
            right += int((rows[:, :, 0].argmin(1) == own).sum())
        of_four = wilson(right, len(EXPANDED) * SENTENCES).text("{:.0%}".format)
        table.append([model, _mean(saved), *(_mean([one]) for one in saved), of_four])
    names = map(language_name, EXPANDED)
    return Table(["bits per byte that the source saves", "mean", *names, f"right source of {FOUR}"], table)


def agreement_table(scores: Scores) -> Table:
    rows, languages = [], [*next(iter(scores.values()))]
    for model, of in scores.items():
        bits = [next(iter(of[language].values()))[:, 0].reshape(-1, 2) for language in languages]
        rows.append([model, *(wilson(int((b[:, 0] < b[:, 1]).sum()), len(b)).text("{:.1%}".format) for b in bits)])
    return Table(["sentences that are likelier than with a wrong verb", *map(language_name, languages)], rows)


def _mean(numbers: Iterable[Estimate], write: Callable[[float], str] = "{:.3f}".format) -> str:
    return interval_of(mean([*numbers])).text(write)


# Name of a table → its title, its documents from sentences and code, and the table.
TABLES: dict[str, tuple[str, Callable[[Sentences, Iterable[str]], Texts], Callable[[Scores], Table]]] = {
    "flores": ("languages of FLORES-101", in_all_languages, all_languages_table),
    "mixed": ("mixed text, sides apart", mixed, mixed_table),
    "translation": ("translation without generation", with_sources, translation_table),
    "agreement": ("agreement of verbs", partial(in_all_languages, most=2 * PAIRS), agreement_table),
}
