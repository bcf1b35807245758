"""The measurement of what no replay text contains: its texts, and what their numbers say."""

import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from examples.languages import EXPANDED
from examples.real_model import unseen
from examples.real_model.page import write_results
from examples.real_model.settings import BASE, LORA_SWITCHED, SWITCHED
from examples.real_model.unseen_results import (
    choices_table,
    collect_short,
    collect_unseen,
    unseen_picture,
    unseen_tables,
    with_recorded,
)
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.measure.evaluate.result_cache import ResultCache
from moelpr.measure.evaluate.routing import Routing
from moelpr.measure.evaluate.scoring import LanguageScore
from moelpr.measure.report.numbers import percent

WORDS = [f"word{number}" for number in range(100)]


@pytest.mark.parametrize("name", ["copying", "recall"])
def test_the_second_part_repeats_the_first(name: str) -> None:
    texts = getattr(unseen, name)(WORDS)
    for whole, start in zip(texts[name], texts[f"{name}-start"], strict=True):
        assert whole.startswith(start)
        first, again = (sorted(re.findall(r"word\d+", part)) for part in (start, whole.removeprefix(start)))
        assert again == first and len(set(again)) == len(again) == 24


def test_sums_are_right() -> None:
    for text in unseen.arithmetic():
        for line in text.splitlines():
            terms, result = line.split(" = ")
            assert sum(map(int, terms.split(" + "))) == int(result)


def write(run: Path, model: str, factor: float, routing: bool = False) -> None:
    """A model whose bits are `factor` times the base's on text of other than expanded languages, half on those."""
    for text in unseen.files(run):
        draw = random.Random(text)
        bits = [
            draw.uniform(80, 120) * (0.5 if unseen.is_expanded(text) and model != BASE else factor) for _ in "12345"
        ]
        if text.endswith("-start"):
            bits = [one / 2 for one in bits]
        shares = [[1.0, 0.0, 0.0]]
        route = Routing([0], 9, shares, shares, shares, [0.0], [1.0], [0.75], [0.25]) if routing else None
        score = LanguageScore(bits, [100] * 5, [25 if text.endswith("-start") else 50] * 5, [1] * 5, 0, route)
        ResultCache(run / unseen.EVALUATION).write(model, text, {}, asdict(score))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path, BASE, 1.0)
    write(tmp_path, "copies-seed-1", 1.01, routing=True)
    write(tmp_path, "full-10-0.0003", 1.04)
    write(tmp_path, SWITCHED, 1.2)
    return tmp_path


def test_changes_are_against_the_base_and_leads_against_moe_lpr(run: Path) -> None:
    found = collect_unseen(run)["settings"]
    assert found["copies"]["change"]["unseen"] == pytest.approx([0.01] * 3, abs=1e-4)
    assert found["copies"]["change"]["learned"] == pytest.approx([-0.5] * 3, abs=1e-4)
    assert found["full-10-0.0003"]["against"]["unseen"] == pytest.approx([0.03] * 3, abs=1e-4)
    assert found["copies"]["routing"]["unseen"] == {"all_original_share": 0.75, "new_gate_weight": 0.25}


def test_adapters_that_are_switched_change_only_what_expanded_languages_ask(run: Path) -> None:
    change = collect_unseen(run)["settings"][LORA_SWITCHED]["change"]
    assert change["unseen"] == change["code"] == change["original"] == [0, 0, 0]
    assert change["learned"][0] == pytest.approx(-0.5) and change["mixed"][0] == pytest.approx(0.2)


def test_the_page_has_every_setting_that_is_done(run: Path) -> None:
    results = collect_unseen(run)
    tables, picture = unseen_tables(results), unseen_picture(results)
    for setting in results["settings"].values():
        assert setting["label"] in tables
    assert percent(0.04) in picture and "10% replay" in picture
    assert collect_unseen(run / "empty") == {}


def test_who_has_to_choose_sees_both_bases_and_the_range_over_seeds(run: Path) -> None:
    write(run, "full-10-0.0003-seed-2", 1.06)
    short = collect_unseen(run)
    table = choices_table(short, {"settings": {"copies": short["settings"]["copies"]}})
    full = next(line for line in table.splitlines() if "full fine-tuning" in line)
    assert "+5.0% (+4.0% to +6.0%)" in full and full.rstrip("| ").endswith(")")
    copies = next(line for line in table.splitlines() if "K copies" in line)
    assert copies.count("+1.0%") == 2 and copies.count("\u221250.0%") == 2


def test_a_short_queue_says_how_often_models_go_on_in_another_language(run: Path) -> None:
    rate = {"rate": {"value": 0.5, "low": 0.25, "high": 0.75}, "decided": 12, "undecided": 0}
    write_text(run / "wrong-language" / "results.json", json.dumps({"wrong_language": {"pl": {BASE: rate}}}))
    assert "| pl" in unseen_tables(collect_short(run)) and "50%" in unseen_tables(collect_short(run))
    assert "| pl" not in unseen_tables(collect_unseen(run))


def test_a_run_keeps_what_another_has_measured(run: Path) -> None:
    found = collect_short(run)
    recorded = {"base": {}, "settings": {"halfway": {"label": "half"}, "copies": {"label": "old"}}}
    recorded["wrong_language"] = {"pl": {}}
    together = with_recorded(found, recorded)
    assert {*together["settings"]} == {*found["settings"], "halfway"}
    assert together["settings"]["copies"] == found["settings"]["copies"] and together["base"] == found["base"]
    assert together["wrong_language"] == {"pl": {}}
    assert with_recorded(found, together)["settings"].keys() == together["settings"].keys()
    with pytest.raises(UserError, match="another base or other text"):
        with_recorded(found, together | {"base": {"recall": 1.01 * found["base"]["recall"]}})


def test_a_short_queue_without_the_base_has_no_page(tmp_path: Path) -> None:
    write_text(tmp_path / "queue.txt", "--short\n")
    with pytest.raises(UserError, match="no evaluation of the base"):
        write_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["queue.txt"]


def test_texts_are_those_that_neither_training_nor_replay_has() -> None:
    assert not {*unseen.LANGUAGES} & {*EXPANDED, "en", "es", "zh"}
