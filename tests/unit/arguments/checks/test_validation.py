"""Held-out text while training."""

from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus_writer import CorpusWriter


def corpus(prefix: Path, *is_original: bool, tokens: int = 20) -> str:
    with CorpusWriter(prefix, vocab_size=128) as writer:
        for bit in is_original:
            writer.add_document(np.arange(tokens), bit)
        writer.finalize()
        writer.commit()
    return str(prefix)


def test_held_out_text_of_two_languages_is_taken(upcycled: str, accepted, tmp_path: Path) -> None:
    words = [f"en={corpus(tmp_path / 'en', True, True)}", f"el={corpus(tmp_path / 'el', False)}"]
    taken = accepted("stage1", upcycled, "--validation-data", *words, "--split", "100,0,0", "--eval-interval", "5")
    assert taken["validation_data"] == words


def test_held_out_text_that_cannot_be_meant_is_refused(upcycled: str, refused, tmp_path: Path) -> None:
    good = f"en={corpus(tmp_path / 'en', True)}"
    for words, said in [
        ([str(tmp_path / "en")], [f"--validation-data {tmp_path / 'en'} is no LANG=PREFIX; write for example "
                                  "el=data/el-test_text_document"]),
        ([good, good], ["--validation-data names en twice; give each language one corpus"]),
        (["el=nowhere"], ["nowhere.bin and .idx are not both there; build them with data_tools/preprocess_data.py"]),
    ]:  # fmt: skip
        assert refused("stage1", upcycled, "--validation-data", *words) == said
    mixed, short = corpus(tmp_path / "mixed", True, False), corpus(tmp_path / "short", True, tokens=1)
    (said,) = refused("stage1", upcycled, "--validation-data", f"xx={mixed}")
    assert "holds text of original and expanded languages" in said
    (said,) = refused("stage1", upcycled, "--validation-data", f"xx={short}")
    assert "holds 1 tokens; give a corpus with text" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--split", "90,10,0"], "--split and --validation-data both say what to validate on"),
        (["--full-validation"], "--full-validation and --validation-data both say what to validate on"),
        (["--eval-interval", "0"], "--eval-interval 0 must be at least 1"),
        (["--eval-iters", "-1"], "--eval-iters -1 must be at least 1, or 0 for all held-out text"),
        (["--warn-window", "0"], "--warn-window 0 must be at least 1"),
    ],
)
def test_settings_that_go_against_it_are_refused(
    upcycled: str, refused, tmp_path: Path, words: list[str], said: str
) -> None:
    held_out = f"en={corpus(tmp_path / 'en', True)}"
    (found,) = refused("stage1", upcycled, "--validation-data", held_out, *words)
    assert found.startswith(said)
