import json
import random
from pathlib import Path

import pytest

from examples import clean_text
from moelpr.base.errors import UserError
from moelpr.data.text.sources import open_source
from moelpr.data.text.streams import open_stream
from tests.support.fasttext_model import write_fasttext_model

WORDS = {"ell_Grek": ["ουρανός", "θάλασσα", "βουνό"], "eng_Latn": ["sky", "sea", "mountain"]}


def text(label: str, name: str, length: int = 40) -> str:
    """Words of a language, each followed by one that only this text has."""
    draw = random.Random(name)
    return " ".join(f"{draw.choice(WORDS[label])} {draw.choice('abcdefghij')}{name}" for _ in range(length // 2))


def ids_of(folder: Path) -> list[str]:
    actual = []
    for file in sorted(folder.glob("*.jsonl.gz")):
        with open_stream(open_source(str(file))) as (lines, _):
            actual += [json.loads(line)["id"] for line in lines]
    return actual


def test_each_step_removes_its_documents_and_the_rest_stays(tmp_path: Path) -> None:
    model = write_fasttext_model(
        tmp_path / "lid.bin", {word: label for label, words in WORDS.items() for word in words}
    )
    held_out = text("ell_Grek", "held")
    part = held_out.split()[7:19]
    documents = {
        "greek": text("ell_Grek", "one"),
        "english": text("eng_Latn", "two"),
        "copy": text("ell_Grek", "one").replace(" ", " , ") + "!",
        "leaked": f"{text('ell_Grek', 'three')} {' '.join(part).title()}. {text('ell_Grek', 'four')}",
        "eleven words": f"{text('ell_Grek', 'five')} {' '.join(part[:-1])} end {text('ell_Grek', 'six')}",
    }
    (tmp_path / "in").mkdir()
    for number, (name, content) in enumerate(documents.items()):  # a file each; that of "english" leaves none
        (tmp_path / "in" / f"{number}.jsonl").write_text(json.dumps({"id": name, "text": content, "n": number}))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": held_out}))
    flags = ["--languages", "el", "--language-id", str(model), "--held-out", str(tmp_path / "test.jsonl")]
    clean_text.main([str(tmp_path / "in"), "--output", str(tmp_path / "out"), *flags, "--workers", "1"])
    assert ids_of(tmp_path / "out") == ["greek", "eleven words"]
    with open_stream(open_source(str(tmp_path / "out" / "00000.jsonl.gz"))) as (lines, _):
        line = json.loads(next(iter(lines)))
    assert (line["text"], line["n"], line["language"]) == (documents["greek"], 0, "el")
    steps = {folder.name: ids_of(folder) for folder in (tmp_path / "out_removed").iterdir()}
    assert steps == {"language": ["english"], "held_out": ["leaked"], "near_duplicates": ["copy"]}
    assert not (tmp_path / "out.unfinished").exists()
    with pytest.raises(UserError, match="already exists"):
        clean_text.main([str(tmp_path / "in"), "--output", str(tmp_path / "out"), *flags])


def test_a_character_is_a_word_in_scripts_without_spaces() -> None:
    assert clean_text.Words().word_tokenize("今天, sky 5") == ["今", "天", "sky", "5"]
