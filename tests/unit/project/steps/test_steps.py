"""The steps of a project: their commands, what they are made from, and what an edit of the file redoes."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.demo_tasks import ROOT
from moelpr.base.errors import UserError
from moelpr.project.file import ProjectFile, parse_project
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.steps import STEPS, flags_of, tasks_of, workflow_of
from moelpr.project.steps.text import held_out_share
from moelpr.project.steps.training import STAGES, corpus_files
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow
from tests.unit.project.conftest import Write

EXPECTED = (
    "preprocess-el preprocess-hu preprocess-en replay convert stage1 stage2 export evaluate routing card report".split()
)


def tasks(path: Path) -> dict[str, Task]:
    return {task.name: task for task in tasks_of(ResolvedProject(read_project(path)))}


def flags(task: Task) -> dict[str, list[str]]:
    """The values of each flag of a task's command."""
    found: dict[str, list[str]] = {}
    for word in task.words():
        if word.startswith("--"):
            found[word] = []
        elif found:
            found[next(reversed(found))].append(word)
    return found


def write_manifest(folder: Path, code: str, tokens: int) -> None:
    content: dict[str, Any] = {
        "tokenizer": {
            "type": "HuggingFaceTokenizer",
            "model": "base",
            "vocab_size": 9,
            "eod_id": 0,
            "special_tokens": True,
            "fingerprint": "x",
            "vocabulary_sha256": "0" * 64,
        },
        "append_eod": True,
        "sources": [],
        "languages": {code: {"bit": "expanded", "documents": 1, "tokens": tokens, "bytes": 1}},
        "documents": 1,
        "tokens": tokens,
        "skipped_lines": 0,
        "files": {},
        "shard_of": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{code}_text_document.manifest.json").write_text(json.dumps(content))


def test_every_step_is_there_and_reads_only_steps_before_it(write: Write) -> None:
    found = tasks(write())
    assert [*found] == EXPECTED
    for place, task in enumerate(found.values()):
        assert {*task.inputs} <= {*EXPECTED[:place]}
    optional = tasks(write(vocabulary={"new_tokens": 9}, chat="a/b", benchmarks={}, model="owner/name"))
    assert {*optional} - {*EXPECTED} == {"download", "vocabulary", "stage0", "graft", "benchmarks"}
    kept = {"expanded": {"el": "el.jsonl"}, "original": {"en": "en.jsonl"}, "kept": {"code": "en.jsonl"}}
    with_kept = tasks(write(languages=kept))
    given = flags(with_kept["calibrate"])
    assert [word for word in with_kept["calibrate"].words() if "=" in word] == [
        "el=el.jsonl",
        "en=en.jsonl",
        "code=en.jsonl",
    ]
    assert given["--expanded-languages"] == ["el"] and given["--save"] == ["out/hf"]
    assert given["--model"] == flags(with_kept["export"])["--save"] == ["out/uncalibrated"]
    assert "calibrate" in with_kept["evaluate"].made_from and "export" in with_kept["calibrate"].made_from
    without = tasks(write(languages=kept, replay="none"))
    assert {*with_kept} - {*without} == {"replay", "stage2"}
    assert flags(without["export"])["--load"] == ["out/stage1"]
    write_manifest(Path("out/data"), "el", 1000)
    assert flags(without["stage1"])["--stage1-experts"] == ["new"]
    assert "--stage1-experts" not in flags(with_kept["stage1"])
    own = tasks(write(languages=kept, replay="none", steps={"stage1": {"stage1-experts": "all"}}))
    assert flags(own["stage1"])["--stage1-experts"] == ["all"]
    assert optional["stage1"].made_from[0] == "stage0" and optional["preprocess-el"].made_from == ("vocabulary",)


def test_stage_1_has_the_budget_and_the_shares_of_the_corpora_when_its_turn_comes(write: Write) -> None:
    path = write(budget={"tokens": "2M"}, mix={"temperature": 1}, steps={"stage1": {"lr": 0.001, "num-workers": 3}})
    with pytest.raises(UserError, match="el_text_document.manifest.json"):
        tasks(path)["stage1"].words()
    for code, tokens in (("el", 3_000_000), ("hu", 1_000_000)):
        write_manifest(Path("out/data"), code, tokens)
    found = flags(tasks(path)["stage1"])
    assert found["--train-tokens"] == ["2000000"] and found["--lr"] == ["0.001"]
    assert found["--data-path"] == ["0.75", "out/data/el_text_document", "0.25", "out/data/hu_text_document"]
    assert "--num-workers" not in found and tasks(path)["stage1"].settings == ["--num-workers", "3"]
    assert flags(tasks(write(budget={"epochs": 2}))["stage1"])["--train-tokens"] == ["8000000"]
    assert "--train-tokens" not in flags(tasks(write(steps={"stage1": {"train-iters": 7}}))["stage1"])
    with pytest.raises(UserError, match=r"languages.yaml, line \d+: budget: 1B tokens would read the text more often"):
        tasks(write(budget={"tokens": "1B"}))["stage1"].words()
    with pytest.raises(UserError, match="budget.hours requires GPUs whose speed is predicted"):
        tasks(write(budget={"hours": 3}))["stage1"].words()


def test_a_gpu_decides_layout_experts_and_the_tokens_of_hours(write: Write) -> None:
    path = write(hardware={"gpu": "h100-80", "gpus": 16}, experts="auto", budget={"hours": 1})
    for code in ("el", "hu"):
        write_manifest(Path("out/data"), code, 10**9)
    found = tasks(path)
    stage1 = found["stage1"]
    assert (stage1.nodes, stage1.gpus_per_node) == (2, 8)
    assert "--micro-batch-size" in stage1.settings and "--micro-batch-size" not in stage1.words()
    assert flags(found["convert"])["--num-new-experts"] == ["8"]
    speed = ResolvedProject(read_project(path)).layouts.of("stage1").tokens_per_s
    assert flags(stage1)["--train-tokens"] == [str(round(3600 * speed))]
    assert stage1.minutes == pytest.approx(60, rel=1e-6)
    small = write(hardware={"gpu": "h100-80", "gpus": 1}, experts={"new": 64})
    with pytest.raises(
        UserError, match=r"languages.yaml, line \d+: stage1: no layout fits on 1 GPU: .* use experts.new 4"
    ):
        tasks(small)
    with pytest.raises(UserError, match=r"line \d+: hardware.gpu h100 is unknown; use .*h100-80"):
        tasks(write(hardware={"gpu": "h100"}))


def test_layouts_and_logs_redo_nothing_but_text_and_rates_do(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(words: list[str], log: Path, environment: Any) -> int:
        return 0

    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", execute)
    for code in ("el", "hu"):
        write_manifest(Path("out/data"), code, 10**6)

    def states(path: Path, run: bool = False) -> list[str]:
        file = read_project(path)
        flow = workflow_of(file)
        if run:
            for task in flow.tasks.values():
                object.__setattr__(task, "is_complete", lambda: True)
            flow.run()
        return [one.task.name for one in flow.outlook() if one.reason and "was removed" not in one.reason]

    assert states(write(), run=True) == []
    assert states(write(steps={"stage1": {"save-interval": 7}, "preprocess": {"workers": 2}})) == []
    assert states(write(steps={"stage2": {"lr": 1e-3}})) == EXPECTED[EXPECTED.index("stage2") :]
    assert states(write(held_out=7)) == ["evaluate", "routing", "card", "report"]
    with open("hu.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert states(write()) == [
        "preprocess-hu",
        *EXPECTED[EXPECTED.index("replay") : EXPECTED.index("convert")],
        *EXPECTED[5:],
    ]


def test_corpora_that_exist_take_the_place_of_text(write: Write) -> None:
    languages = {"expanded": {"el": {"held_out": "el.jsonl"}}, "original": {"en": {"held_out": "en.jsonl"}}}
    path = write(languages=languages, corpora={"stage1": "a/el", "stage2": [2, "a/el", "0.5", "a/en"]})
    places = ResolvedProject(read_project(path))
    found = {task.name: task for task in tasks_of(places)}
    assert [*found][:3] == ["convert", "stage1", "stage2"]
    assert flags(found["stage2"])["--data-path"] == ["2", "a/el", "0.5", "a/en"]
    assert flags(found["stage1"])["--train-epochs"] == ["1.0"]
    assert [str(file) for file in corpus_files(places, "stage1")] == ["a/el.bin", "a/el.idx", "a/el.lang"]


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if step.tool and step not in STAGES[1:]])
def test_the_flags_of_a_step_are_flags_of_its_command(name: str) -> None:
    assert STEPS[name].reserved | STEPS[name].speed <= flags_of(STEPS[name])


BASELINE_STEPS = "preprocess-el preprocess-hu preprocess-en convert dense export evaluate card report".split()


def test_a_method_without_experts_converts_trains_and_exports_a_dense_model(write: Write) -> None:
    for code in ("el", "hu", "en"):
        write_manifest(Path("out/data"), code, 10**6)
    for method, name in (("full", "dense"), ("ffn", "ffn")):
        places = ResolvedProject(read_project(write(method=method, experts=None)))
        found = {task.name: task for task in tasks_of(places)}
        assert [*found] == [name if step == "dense" else step for step in BASELINE_STEPS]
        convert, train, export = (flags(found[step]) for step in ("convert", name, "export"))
        assert convert["--dense"] == [] and "--num-new-experts" not in convert
        assert train["--pretrained-checkpoint"] == convert["--save"] and train["--recipe"] == ["paper-dense"]
        assert train["--train-tokens"] == ["2000000"] and "replay" not in found
        assert export["--load"] == [f"out/{name}"] and export["--save"] == [str(places.export)] == ["out/hf"]
        assert f"{method}=out/hf" in found["evaluate"].words() and flags(found["card"])["--evaluated"] == [method]
        assert "routing.json" not in " ".join(found["report"].words())


def test_lora_is_one_step_on_one_gpu(write: Write) -> None:
    for code in ("el", "hu"):
        write_manifest(Path("out/data"), code, 10**6)
    changes: dict[str, Any] = {"method": "lora", "experts": None, "hardware": {"gpu": "h100-80", "gpus": 16}}
    path = write(**changes, lora={"rank": 4, "modules": ["q_proj", "v_proj"]}, steps={"lora": {"lr": 1e-3}})
    found = tasks(path)
    without = ("convert", "export")
    assert [*found] == ["lora" if step == "dense" else step for step in BASELINE_STEPS if step not in without]
    lora = flags(found["lora"])
    assert (found["lora"].nodes, found["lora"].gpus_per_node) == (1, 1)
    assert lora["--rank"] == ["4"] and lora["--modules"] == ["q_proj", "v_proj"] and lora["--lr"] == ["0.001"]
    assert lora["--export"] == ["out/hf"] and lora["--train-tokens"] == ["2000000"]
    assert found["evaluate"].made_from[0] == "lora"


def test_replay_in_the_mix_is_a_fraction_of_the_tokens_from_the_original_languages(write: Write) -> None:
    for code, tokens in (("el", 3_000_000), ("hu", 1_000_000), ("en", 10**7)):
        write_manifest(Path("out/data"), code, tokens)
    data = ["0.6", "out/data/el_text_document", "0.2", "out/data/hu_text_document", "0.2", "out/data/en_text_document"]
    for method, name in (("moe-lpr", "stage1"), ("full", "dense"), ("lora", "lora")):
        file = write(method=method, experts=None, mix={"temperature": 1, "replay": 0.2})
        found = tasks(file)
        assert flags(found[name])["--data-path"] == data and flags(found[name])["--train-tokens"] == ["5000000"]
        assert "preprocess-en" in found[name].made_from and "--max-samples" not in flags(found["preprocess-en"])
    assert "--max-samples" in flags(tasks(write())["preprocess-en"])
    too_much = write(budget={"tokens": "200M"}, mix={"replay": 0.99})
    with pytest.raises(UserError, match=r"line \d+: mix.replay: 198M tokens would read the text more often"):
        tasks(too_much)["stage1"].words()
    held_out = {"expanded": {"el": {"held_out": "el.jsonl"}}, "original": {"en": {"held_out": "en.jsonl"}}}
    with pytest.raises(UserError, match=r"line \d+: mix.replay has no effect with corpora"):
        tasks(write(languages=held_out, corpora={"stage1": "a", "stage2": "b"}, mix={"replay": 0.1}))


def test_projects_share_text_that_one_of_them_has_made(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", lambda *_, **__: 0)

    def workflow(**changes: Any) -> Workflow:
        flow = workflow_of(read_project(write(text_output="text", **changes)))
        for task in flow.tasks.values():
            object.__setattr__(task, "is_complete", lambda: True)
        return flow

    first = workflow()
    text = [task for task in first.tasks.values() if task.name.startswith("preprocess")]
    first.run(text)
    assert [*flags(text[0])["--output-prefix"]] == ["text/data/el"] and text[0].name in first.wall_times_s()
    assert "el=text/data/el_validation.jsonl" in first.tasks["evaluate"].words()
    other = workflow(method="full", experts=None, output="other")
    states = {one.task.name: one.state for one in other.outlook()}
    assert [name for name, state in states.items() if state == "done"] == [task.name for task in text]
    assert not Path("other/logs").exists() and not Path("out/logs").exists()
    changed = workflow(method="ffn", experts=None, output="third", steps={"preprocess": {"min-chars": 9}})
    assert "preprocess-el is shared with other projects, but its command has changed" in changed.outlook()[0].refusal
    with pytest.raises(UserError, match="give all of them the same text.* or another folder than text"):
        changed.run()


def test_conversations_are_a_last_stage_whose_result_is_exported(write: Write) -> None:
    talk = {"text": "el.jsonl", "conversations": "el.jsonl"}
    kept = {"text": "en.jsonl", "conversations": ["en.jsonl", "es.jsonl"]}
    languages = {"expanded": {"el": talk, "hu": "hu.jsonl"}, "original": {"en": kept}}
    found = tasks(write(languages=languages, chat_template="base", steps={"sft": {"seq-length": 512}}))
    assert {*found} - {*EXPECTED} == {"conversations-el", "conversations-en", "sft"}
    words = flags(found["conversations-en"])
    assert words["--input"] == ["en.jsonl", "es.jsonl"] and words["--max-tokens"] == ["512"]
    assert words["--chat-template-from"] == ["base"] and words["--conversations"] == []
    sft = flags(found["sft"])
    assert sft["--pretrained-checkpoint"] == ["out/stage2"] and sft["--recipe"] == ["sft"]
    assert sft["--data-path"] == ["out/data/el_chat_messages_document", "out/data/en_chat_messages_document"]
    assert found["sft"].made_from == ("stage2", "conversations-el", "conversations-en")
    export = flags(found["export"])
    assert export["--load"] == ["out/sft"] and export["--chat-template-from"] == ["base"]
    assert "out/sft" in found["report"].words() and found["export"].made_from == ("sft",)
    languages["original"]["en"] = "en.jsonl"
    with pytest.raises(UserError, match=r"line \d+: no original language has conversations, .*lpr-loss-coeff to 0"):
        tasks(write(languages=languages))
    assert "sft" in tasks(write(languages=languages, steps={"sft": {"lpr-loss-coeff": 0}}))
    with pytest.raises(UserError, match=r"line \d+: chat_template requires conversations in a language"):
        tasks(write(chat_template="base"))


def test_a_project_of_the_hub_is_downloaded_to_its_folder(write: Write) -> None:
    found = tasks(write(model="Qwen/Qwen3-8B-Base@main"))
    words = found["download"].words()
    assert words[2:] == [
        "download",
        "Qwen/Qwen3-8B-Base",
        "--local-dir",
        "out/base",
        *words[6:-2],
        "--revision",
        "main",
    ]
    assert "*.bin" not in words and "*.py" not in words
    assert flags(found["convert"])["--hf-path"] == ["out/base"] and found["convert"].made_from == ("download",)
    with pytest.raises(
        UserError, match=r"line 1: model: there is no folder no/such/folder, and it is no name on the Hub"
    ):
        tasks(write(model="no/such/folder"))


def test_no_more_text_is_held_out_than_is_needed() -> None:
    assert held_out_share(10**12) == 2e-5 and held_out_share(10**6) == held_out_share(0) == 0.05


def test_a_stage_that_changes_is_refused_unless_it_is_redone_with_those_after_it(write: Write) -> None:
    file = read_project(write())
    assert workflow_of(file, "stage1")._redo == {"stage1", "stage2"}
    assert workflow_of(file)._redo == frozenset()


def test_the_demos_file_is_a_project() -> None:
    path = ROOT / "examples" / "demo.yaml"
    file: ProjectFile = parse_project(path.read_text(), path)
    assert file.project.experts.new == 4 and [*file.project.languages.expanded] == ["el", "hu", "tr"]
