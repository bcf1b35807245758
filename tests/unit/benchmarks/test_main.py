"""The command that compares contenders."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

import benchmarks.__main__ as command
from moelpr.process.errors import UserError


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words: str) -> tuple[str, object]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
        with pytest.raises(SystemExit) as end:
            command.main()
        return capsys.readouterr().out, end.value.code

    return run


@pytest.mark.parametrize(("ours", "code"), [([1.5, 2.0, 1.9], 0), ([2.5, 4.0, 1.0], 1)])
def test_a_ratio_above_the_limit_fails(run, monkeypatch, tmp_path, ours, code):
    times = {"theirs": [2.0, 2.0, 2.0], "ours": ours, "free": [9.0, 9.0, 9.0]}
    fake = SimpleNamespace(DEFAULTS={"name": "a"}, run=lambda turns, settings: [(settings.name, times)])
    monkeypatch.setitem(sys.modules, "benchmarks.comparisons.fake", fake)
    one = command.Benchmark("ours", "theirs", 3, ratio=1.1, only_reported=("free",))
    monkeypatch.setitem(command.BENCHMARKS, "fake", one)
    printed, found = run("fake", "name=b", "--json", str(tmp_path / "a.json"))
    rows = json.loads((tmp_path / "a.json").read_text())["fake"]
    assert found == code and [row["is_kept"] for row in rows] == [code == 0, ""]
    assert re.search(rf"b +ours +theirs +{rows[0]['ratio']:.3f}", printed) and rows[1]["ratio"] == 4.5


def test_settings_belong_to_the_benchmark_before_them():
    (first, packed), (second, launcher) = command.chosen(["packed_attention", "seq_length=8,9", "launcher", "ranks=2"])
    assert (first, packed.seq_length, packed.heads) == ("packed_attention", (8, 9), 8)
    assert (second, launcher.ranks) == ("launcher", 2)


@pytest.mark.parametrize("words", ["nothing", "ranks=2 launcher", "launcher heads=2", "launcher ranks"])
def test_unknown_words_are_refused(words):
    with pytest.raises(UserError, match="--list"):
        command.chosen(words.split())
