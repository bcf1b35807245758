"""Parts of documents, switches, and the tables on FLORES-101, with tiny models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.experiments import flores, parts
from examples.experiments.flores import MIXED, SENTENCES, read_flores
from examples.experiments.parts import KEPT, NEW, Scores, add_switches, measure, write_mean
from examples.languages import EXPANDED
from moelpr.base.errors import UserError
from moelpr.measure.evaluate.compare import compare_models
from tests.support.small_tokenizers import save_qwen

WORDS = {"en": "the weather in the city is good", "el": "ο καιρός στην πόλη είναι καλός", "fi": "sää on hyvä"}
WORDS |= {"hu": "az időjárás a városban jó", "tr": "şehirde hava güzel"}
SENTENCES_OF = {code: [f"{words} {n}." for n in range(500)] for code, words in WORDS.items()}
GREEK, ENGLISH = (SENTENCES_OF[code][:3] for code in ("el", "en"))
FILE = "model.safetensors"
CODE = ["\n".join(f"x = {n}" for n in range(99))] * 20


@pytest.fixture
def models(make_model, tmp_path: Path) -> dict[str, Path]:
    """A base, and the same with noise."""
    models = {name: tmp_path / name for name in ("base", "full")}
    for name, path in models.items():
        make_model("Qwen2ForCausalLM", vocab_size=600).rename(path)
        save_qwen(path)
        if name == "full":
            tensors = {key: value + 0.02 * torch.randn_like(value) for key, value in load_file(path / FILE).items()}
            save_file(tensors, path / FILE, {"format": "pt"})
    return models


def test_parts_add_up_to_what_evaluation_measures_and_are_measured_once(models, tmp_path, monkeypatch) -> None:
    pairs = [*zip(ENGLISH, GREEK, strict=True)]
    texts = {
        "el": [[(NEW, text)] for text in GREEK],
        "mixed": [[(KEPT, f"{one}\n"), (NEW, other), (KEPT, one)] for one, other in pairs],
    }
    scores, minutes = measure(models, texts, tmp_path / "out")
    expected = compare_models(models, {"el": GREEK}, base=models["base"], device="cpu", dtype="bfloat16").scores
    for model, of in expected.items():
        bits, sizes, tokens, nats = scores[model]["el"][NEW].T
        assert bits == pytest.approx(of["el"].document_bits, rel=0.01)
        assert sizes.tolist() == of["el"].document_bytes and tokens.tolist() == of["el"].document_tokens
        assert nats == pytest.approx(of["el"].document_distances or [0] * 3, rel=0.05)
        sides = scores[model]["mixed"]
        assert sides[KEPT][:, 1].tolist() == [2 * len(one) + 1 for one in ENGLISH]
        assert sides[NEW][:, 1:3].tolist() == np.stack([sizes, tokens], 1).tolist()
    assert scores["full"]["mixed"][KEPT][:, 3].min() > 0 == scores["base"]["mixed"][KEPT][:, 3].max()
    monkeypatch.setattr(parts, "load_model", None)
    again, same_minutes = measure(models, texts, tmp_path / "out")
    assert same_minutes == minutes and min(minutes.values()) > 0
    assert (again["full"]["mixed"][NEW] == scores["full"]["mixed"][NEW]).all()


def test_a_switch_is_the_rival_where_the_first_tokens_are_new_and_an_oracle_where_any_is(models) -> None:
    texts = {"both": [[(KEPT, ENGLISH[0]), (NEW, GREEK[0])], [(NEW, GREEK[1]), (KEPT, ENGLISH[1])]]}
    texts |= {"en": [[(KEPT, text)] for text in ENGLISH]}
    rows = {
        text: {what: np.ones((len(its), 4)) for what in {what for what, _ in its[0]}} for text, its in texts.items()
    }
    scores: Scores = {"base": rows, "full": {text: {x: 2 * of for x, of in its.items()} for text, its in rows.items()}}
    add_switches(scores, texts, models["base"])
    chosen = {way: scores[f"full, switched by {way}"] for way in ("py3langid", "an oracle")}
    assert chosen["py3langid"]["both"][NEW][:, 0].tolist() == [1, 2]
    assert chosen["an oracle"]["both"][NEW][:, 0].tolist() == [2, 2]
    assert {one["en"][KEPT].max() for one in chosen.values()} == {1}


def test_a_mean_is_halfway(models, tmp_path) -> None:
    write_mean(models["base"], models["full"], tmp_path / "mean")
    base, full, mean = (load_file(path / FILE) for path in (*models.values(), tmp_path / "mean"))
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (base[name] + full[name]) / 2)


def test_mixed_text_has_two_sides_and_translations() -> None:
    for kind, documents in flores.mixed(SENTENCES_OF, CODE).items():
        assert len(documents) == MIXED
        for document in documents:
            assert {what for what, _ in document} == {KEPT, NEW}, kind
            assert all((what == NEW) != (text.startswith("x = ") or WORDS["en"] in text) for what, text in document)
    alternating = flores.mixed(SENTENCES_OF, CODE)["sentences that alternate"]
    assert {document[0][0] for document in alternating} == {KEPT, NEW}


def test_tables_name_changes_distances_and_the_source_of_four_that_helps_most() -> None:
    def rows(bits: float, nats: float, number: int) -> np.ndarray:
        return np.tile([bits, 4.0, 2.0, nats], (number, 1))

    kinds = {text: rows(8, 0, SENTENCES) for text in WORDS}
    changed = {text: rows(6 if text in EXPANDED else 9 if text == "fi" else 8, 1, SENTENCES) for text in WORDS}

    def sides(of: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        return {text: {NEW: x, KEPT: x} if text in EXPANDED else {KEPT: x} for text, x in of.items()}

    scores = {"base": sides(kinds), "full": sides(changed)}
    table = flores.all_languages_table(scores)
    [[name, learned, others, distance, worst, relatives]] = [*table.rows]
    assert name == "full" and [x.split(" ")[0] for x in (learned, others, distance)] == ["−25.0%", "+6.2%", "0.500"]
    assert worst.startswith("Finnish +12.5%") and relatives == "Finnish +12.5%"
    point = "full: learned −25.0% [−25.0%, −25.0%], KL of other languages, nats per token 0.50 [0.50, 0.50]"
    chart = flores.all_languages_chart(scores | {"lora-alone, switched by an oracle": scores["base"]})
    assert point in chart and "LoRA" not in chart
    less = scores["full"] | {"el": {x: rows(7, 3, SENTENCES) for x in (NEW, KEPT)}}
    two = parts.against_base(scores | {"full-seed2": less}, "el", NEW)["full"]
    assert {name: sorted({*np.round(its, 6)}) for name, its in two.items()} == {
        "change": [-0.25, -0.1875, -0.125],  # samples draw one seed twice, or both
        "distance": [0.5, 1, 1.5],
    }
    assert [one[0] for one in two.values()] == [-0.1875, 1]
    table = flores.mixed_table(
        {name: {"kind": {KEPT: its["fi"], NEW: its["el"]}} for name, its in (("base", kinds), ("full", changed))}
    )
    assert table.rows[0][-1] == "0.500 / −25.0%"
    texts = flores.with_sources(SENTENCES_OF, [])
    is_own = [[one[0][1].split()[-1] == one[1][1].split()[-1] for one in of] for of in texts.values()]
    assert [sum(its) for its in is_own] == [SENTENCES] * 3
    of_four = {
        code: {NEW: rows(8, 0, 4 * SENTENCES) - np.outer(own, [2, 0, 0, 0])}
        for code, own in zip(texts, is_own, strict=True)
    }
    [[_, saved, *_, right]] = [*flores.translation_table({"base": of_four}).rows]
    assert saved.startswith("0.500") and right.startswith("100%")


def test_pairs_are_chosen_evenly_and_a_table_counts_those_told_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(flores, "PAIRS", 2)
    for folder, number in (("tur", 4), ("eng", 2)):
        (tmp_path / folder).mkdir()
        lines = ["\tsen\twrong_sen", *(f"{n}\tright {n}\twrong {n}" for n in range(number))]
        (tmp_path / folder / "data.tsv").write_text("\n".join(lines))
    pairs = flores.read_pairs(tmp_path)
    assert pairs == {
        "en": ["right 0", "wrong 0", "right 1", "wrong 1"],
        "tr": ["right 0", "wrong 0", "right 2", "wrong 2"],
    }
    _, texts_of, table_of = flores.TABLES["agreement"]
    texts = texts_of(pairs, [])
    assert texts["tr"][1] == [(NEW, "wrong 0")] and texts["en"][0] == [(KEPT, "right 0")]
    bits = {"en": [1.0, 2, 3, 4], "tr": [1.0, 2, 4, 3]}
    rows = {text: {(NEW if text == "tr" else KEPT): np.array([[b, 1, 1, 0] for b in of])} for text, of in bits.items()}
    assert [cell.split(" ")[0] for cell in table_of({"base": rows}).rows[0][1:]] == ["100.0%", "50.0%"]
    with pytest.raises(UserError, match="tur/data.tsv"):
        flores.read_pairs(tmp_path / "tur")


def test_flores_is_read_by_code_and_must_be_parallel(tmp_path) -> None:
    (tmp_path / "dev").mkdir()
    for code in ("ell", "jav", "zho_simpl"):
        (tmp_path / "dev" / f"{code}.dev").write_text(f"{code} 0\n{code} 1\n{code} 2\n{code} 3\n")
    assert read_flores(tmp_path)["el"] == ["ell 1", "ell 3"]
    assert [*read_flores(tmp_path, ["jv"])] == ["zh", "el", "jv"] and len(read_flores(tmp_path, [""])) == 3
    (tmp_path / "dev/jav.dev").write_text("one line\n")
    with pytest.raises(UserError, match="other lengths"):
        read_flores(tmp_path)
    with pytest.raises(UserError, match="no files"):
        read_flores(tmp_path / "dev")
