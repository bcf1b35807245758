"""The steps of a project: their commands, what they are made from, and what an edit of the file redoes."""

from pathlib import Path
from typing import Any

import pytest

from moelpr.base import checksums
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.settings import flags_of
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.running import run_here
from moelpr.project.steps.step import has_corpora, has_model
from moelpr.project.steps.steps import STEPS, parser_of, tasks_of, workflow_of
from moelpr.project.steps.text import held_out_share
from moelpr.project.steps.training import STAGES
from moelpr.project.tables import plan, status
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow
from tests.support.manifests import write_manifest
from tests.support.model_shapes import save_config
from tests.unit.project.conftest import Write, write_findings

EXPECTED = (
    "preprocess-el preprocess-hu preprocess-en replay convert stage1 stage2 export evaluate routing card report".split()
)
FULL, FFN, LORA = ({"method": method, "experts": None} for method in ("full", "ffn", "lora"))
AUTO = {"method": "auto", "experts": None}
SECOND_FFN, LOW_RANK = {"experts": {"topk": 1}}, {"experts": {"new": 1, "topk": 1, "rank": 8}}
APART = {"method": "second-ffn", "experts": "per-language"}
APART_LOW_RANK = {"experts": {"topk": 1, "rank": 8, "per_language": True}}
GPUS = {"gpu": "h100-80", "gpus": 16}
KEPT = {"expanded": {"el": "el.jsonl"}, "original": {"en": "en.jsonl"}, "kept": {"code": "en.jsonl"}}
CORPORA = {
    "languages": {"expanded": {"el": {"held_out": "el.jsonl"}}, "original": {"en": {"held_out": "en.jsonl"}}},
    "corpora": {"stage1": "a/el", "stage2": [2, "a/el", "0.5", "a/en"]},
}
WITHOUT_STAGE2 = {"languages": KEPT, "replay": "none"}
CHAT = {
    "languages": {
        "expanded": {"el": {"text": "el.jsonl", "conversations": "el.jsonl"}, "hu": "hu.jsonl"},
        "original": {"en": {"text": "en.jsonl", "conversations": ["en.jsonl", "es.jsonl"]}},
    },
    "chat_template": "base",
    "steps": {"sft": {"seq-length": 512}},
}


def tasks(path: Path) -> dict[str, Task]:
    return {task.name: task for task in tasks_of(ResolvedProject(read_project(path)))}


def value(task: Task, flag: str) -> str:
    words = task.words()
    return words[words.index(flag) + 1]


def write_manifests(**tokens: int) -> None:
    for code, number in ({"el": 3_000_000, "hu": 1_000_000, "en": 10**7} | tokens).items():
        write_manifest(Path(f"out/data/{code}_text_document"), number)


@pytest.mark.parametrize(
    ("changes", "more", "less"),
    [
        ({}, "", ""),
        ({"vocabulary": {"new_tokens": 9}, "chat": "a/b"}, "vocabulary stage0 graft", ""),
        ({"model": "owner/name", "benchmarks": {}}, "download benchmarks", ""),
        ({"languages": KEPT}, "calibrate", "preprocess-hu"),
        (WITHOUT_STAGE2, "calibrate", "preprocess-hu replay stage2"),
        (CORPORA, "", "preprocess-el preprocess-hu preprocess-en replay"),
        (CHAT, "conversations-el conversations-en sft", ""),
        ({"trackers": {"wandb_project": "p"}}, "track", ""),
        (FULL, "dense", "replay stage1 stage2 routing"),
        (FFN, "ffn", "replay stage1 stage2 routing"),
        (LORA, "lora", "replay convert stage1 stage2 export routing"),
        (SECOND_FFN | {"chat": "a/b"}, "ffn combine graft", "replay stage1 stage2"),
        (SECOND_FFN | {"languages": KEPT}, "ffn combine", "preprocess-hu replay stage1 stage2"),
        (LOW_RANK, "lora combine", "replay convert stage1 stage2 export"),
        (AUTO, "ffn combine twins review", "stage1"),
        (APART, "ffn-el ffn-hu export-el export-hu combine", "replay stage1 stage2 export"),
        ({"method": "paper"}, "", ""),
    ],
)
def test_a_project_has_the_steps_that_its_file_asks_for(write: Write, changes: dict, more: str, less: str) -> None:
    actual = tasks(write(**changes))
    assert {*actual} == {*EXPECTED, *more.split()} - {*less.split()}
    for place, task in enumerate(actual.values()):
        assert {*task.inputs} <= {*[*actual][:place]}


EL, HU, EN = (f"out/data/{code}_text_document" for code in ("el", "hu", "en"))
BLEND = {"mix": {"temperature": 1, "replay": 0.2}}
WITH_REPLAY = f"--train-tokens 5000000; --data-path 0.6 {EL} 0.2 {HU} 0.2 {EN}"


@pytest.mark.parametrize(
    ("changes", "step", "words"),
    [
        ({"model": "a/b@main"}, "convert", "--hf-path out/base; --num-new-experts 2; no --dense"),
        ({"languages": KEPT}, "export", "--load out/stage2; --save out/uncalibrated"),
        ({"languages": KEPT}, "calibrate", "--model out/uncalibrated; --save out/hf; --expanded-languages el"),
        ({"languages": KEPT}, "stage1", "no --stage1-experts"),
        (WITHOUT_STAGE2, "stage1", "--stage1-experts new"),
        (WITHOUT_STAGE2 | {"steps": {"stage1": {"stage1-experts": "all"}}}, "stage1", "--stage1-experts all"),
        (WITHOUT_STAGE2, "export", "--load out/stage1"),
        ({"budget": {"epochs": 2}}, "stage1", "--train-tokens 8000000"),
        ({"steps": {"stage1": {"train-iters": 7}}}, "stage1", "no --train-tokens; --train-iters 7"),
        ({"budget": {"tokens": "2M"}, "mix": {"temperature": 1}}, "stage1", f"--data-path 0.75 {EL} 0.25 {HU}"),
        ({"budget": {"tokens": "2M"}}, "stage1", "--train-tokens 2000000"),
        ({"steps": {"stage1": {"lr": 1e-3}}}, "stage1", "--train-tokens 4000000; --lr 0.001"),
        (CORPORA, "stage1", "--data-path a/el; --train-epochs 1.0"),
        (CORPORA, "stage2", "--data-path 2 a/el 0.5 a/en"),
        (CHAT, "conversations-en", "--input en.jsonl es.jsonl; --max-tokens 512; --chat-template-from base"),
        (CHAT, "sft", "--pretrained-checkpoint out/stage2; --recipe sft"),
        (CHAT, "sft", "--data-path out/data/el_chat_messages_document out/data/en_chat_messages_document"),
        (CHAT, "export", "--load out/sft; --chat-template-from base"),
        (CHAT, "report", "out/sft"),
        (FULL, "convert", "--dense; no --num-new-experts; --save out/converted"),
        (FULL, "dense", "--pretrained-checkpoint out/converted; --recipe paper-dense; --train-tokens 4000000"),
        (FFN, "export", "--load out/ffn; --save out/hf"),
        (FFN, "evaluate", "ffn=out/hf"),
        (FFN, "card", "--evaluated ffn"),
        (LORA | {"steps": {"lora": {"lr": 1e-3}}}, "lora", "--lr 0.001; --export out/hf; --train-tokens 4000000"),
        (LORA | {"lora": {"rank": 4, "modules": ["q", "v"]}}, "lora", "--rank 4; --modules q v"),
        (SECOND_FFN, "convert", "--dense; no --topk; --save out/converted"),
        (SECOND_FFN, "ffn", "--pretrained-checkpoint out/converted; --train-tokens 4000000"),
        (SECOND_FFN, "export", "--load out/ffn; --save out/ffn-hf"),
        (SECOND_FFN, "combine", "moelpr model combine base --expert el,hu=out/ffn-hf; --save out/hf"),
        (SECOND_FFN, "combine", "--text el=el.jsonl --text hu=hu.jsonl --keep-text en=en.jsonl"),
        (SECOND_FFN, "combine", "--exclude out/data/el_validation.jsonl --exclude out/data/hu_validation.jsonl"),
        (SECOND_FFN | {"languages": KEPT}, "combine", "--text el=el.jsonl; --keep-text code=en.jsonl"),
        (SECOND_FFN, "evaluate", "second-ffn=out/hf"),
        (SECOND_FFN, "report", "out/ffn; out/evaluation/routing.json"),
        (LOW_RANK, "lora", "--export out/ffn-hf; --rank 8; --modules down_proj gate_proj up_proj"),
        (LOW_RANK, "combine", "--expert el,hu=out/ffn-hf"),
        (APART, "ffn-hu", f"--data-path 1 {HU}; --train-tokens 1000000; --pretrained-checkpoint out/converted"),
        (APART | {"steps": {"ffn": {"lr": 1e-3}}}, "ffn-el", "--lr 0.001; --save out/ffn-el; --recipe paper-dense"),
        (
            APART | {"budget": {"tokens": "2M", "patience": 9}},
            "ffn-hu",
            "--train-tokens 2000000; --early-stop-patience 9",
        ),
        (APART | {"mix": {"replay": 0.2}}, "ffn-el", f"--data-path 0.8 {EL} 0.2 {EN}; --train-tokens 3750000"),
        (APART, "export-hu", "--load out/ffn-hu; --save out/ffn-hf/hu"),
        (APART, "combine", "--expert el=out/ffn-hf/el --expert hu=out/ffn-hf/hu"),
        (APART, "report", "out/ffn-el out/ffn-hu"),
        (APART_LOW_RANK, "lora-hu", f"--data-path 1 {HU}; --rank 8; --export out/ffn-hf/hu; --save out/lora-hu"),
        ({}, "preprocess-en", "--max-samples 100000"),
        (BLEND, "preprocess-en", "no --max-samples"),
        (BLEND, "stage1", WITH_REPLAY),
        (FULL | BLEND, "dense", WITH_REPLAY),
        (LORA | BLEND, "lora", WITH_REPLAY),
    ],
)
def test_a_step_has_the_flags_that_its_file_asks_for(write: Write, changes: dict, step: str, words: str) -> None:
    path = write(**changes)
    write_manifests()
    command = f"{' '.join(tasks(path)[step].words())} "
    for part in words.split("; "):
        assert (part.removeprefix("no ") + " " in command) != part.startswith("no ")


@pytest.mark.parametrize(
    ("changes", "step", "made_from"),
    [
        ({"vocabulary": {"new_tokens": 9}}, "stage1", "stage0 preprocess-el preprocess-hu"),
        ({"vocabulary": {"new_tokens": 9}}, "preprocess-el", "vocabulary"),
        ({"model": "a/b"}, "convert", "download"),
        ({"languages": KEPT}, "calibrate", "export"),
        ({"languages": KEPT}, "evaluate", "calibrate"),
        (CHAT, "sft", "stage2 conversations-el conversations-en"),
        (CHAT, "export", "sft"),
        (LORA, "evaluate", "lora"),
        (SECOND_FFN, "combine", "export"),
        (LOW_RANK, "combine", "lora"),
        (SECOND_FFN, "evaluate", "combine"),
        (BLEND, "stage1", "convert preprocess-el preprocess-hu preprocess-en"),
        (APART, "ffn-hu", "convert preprocess-hu"),
        (APART, "combine", "export-el export-hu"),
        (APART_LOW_RANK, "combine", "lora-el lora-hu"),
    ],
)
def test_a_step_is_made_from_what_it_reads(write: Write, changes: dict, step: str, made_from: str) -> None:
    read = made_from.split()
    assert [*tasks(write(**changes))[step].made_from][: len(read)] == read


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if step.tool and step not in STAGES[1:]])
def test_the_flags_of_a_step_are_flags_of_its_command(name: str) -> None:
    assert STEPS[name].reserved | STEPS[name].speed <= flags_of(parser_of(STEPS[name]))


def test_another_language_leaves_the_ffns_that_there_are(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", lambda *_, **__: 0)
    write_manifests()
    path = write(**APART, languages={"expanded": {"el": "el.jsonl"}, "original": {"en": "en.jsonl"}})
    complete_workflow(path).run()
    states = {one.task.name: one.state for one in workflow_of(ResolvedProject(read_project(write(**APART)))).outlook()}
    assert {name for name, state in states.items() if state == "to do"} == {"preprocess-hu", "ffn-hu", "export-hu"}
    assert states["ffn-el"] == states["export-el"] == "done" and states["combine"] == "again"
    project = ResolvedProject(read_project(write(**APART, trackers={"wandb_project": "p"})))
    assert workflow_of(project, "ffn-el")._redo == {"ffn-el"}
    assert "--tracker-run" not in [*workflow_of(project).tasks["ffn-el"].settings]


def test_conversations_in_new_languages_only_are_an_error_unless_nothing_is_to_be_kept(write: Write) -> None:
    languages = CHAT["languages"] | {"original": {"en": "en.jsonl"}}
    with pytest.raises(UserError, match=r"line \d+: no original language has conversations, .*lpr-loss-coeff"):
        tasks(write(languages=languages))
    assert "sft" in tasks(write(languages=languages, steps={"sft": {"lpr-loss-coeff": 0}}))


def test_a_command_that_text_decides_waits_for_it_and_its_speed_is_no_part_of_it(write: Write) -> None:
    stage1 = tasks(write(steps={"stage1": {"num-workers": 3}}))["stage1"]
    assert stage1.settings == ["--num-workers", "3"]
    with pytest.raises(UserError, match="el_text_document.manifest.json"):
        stage1.words()
    assert tasks(write(**CORPORA))["stage1"].files[1:] == tuple(Path(f"a/el.{end}") for end in ("bin", "idx", "lang"))


def test_a_downloaded_base_has_no_pickles_and_no_code(write: Write) -> None:
    words = tasks(write(model="Qwen/Qwen3-8B-Base@main"))["download"].words()
    assert words[2:6] == ["download", "Qwen/Qwen3-8B-Base", "--local-dir", "out/base"]
    assert words[-2:] == ["--revision", "main"] and "*.bin" not in words and "*.py" not in words


def test_review_follows_a_second_ffn_that_is_not_good_enough(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    spare = ["replay", "twins", "stage2", "review"]
    path = write(**AUTO)
    write_manifests()
    actual = tasks(path)
    assert [name for name, task in actual.items() if task.is_spare] == spare
    assert "--num-new-experts 2 --topk 2" in " ".join(actual["twins"].words())
    assert value(actual["twins"], "--ffns-of") == "out/ffn-hf" and "--unchecked" in actual["combine"].words()
    assert value(actual["stage2"], "--pretrained-checkpoint") == "out/twins"
    for distance, kept in ((0.2, 0.9), (0.01, 0.8), (0.09, 0.05)):
        write_findings(distance, kept)
        actual = tasks(path)
        assert value(actual["review"], "--load") == "out/stage2" and not actual["review"].is_spare
        assert value(actual["card"], "--evaluated") == "review" and "out/stage2" in actual["report"].words()
        assert value(of_ffn := actual["card-second-ffn"], "--evaluated") == "second-ffn" and "out/hf" in of_ffn.words()
        assert " ".join(actual["evaluate"].words()).count("--model") == 3
    write_findings(0.09, 0.9)
    actual = tasks(path)
    assert all(actual[name].words() == ["-c", "pass"] and not actual[name].gpus_per_node for name in spare)
    assert status(ResolvedProject(read_project(path))).count("not needed") == len(spare)
    assert "out/stage2" not in actual["report"].words() and actual["card"].words()[3] == "out/hf"


def test_text_to_keep_is_fetched_before_routers_are_found(write: Write) -> None:
    actual = tasks(write(**AUTO, languages=KEPT | {"kept": "auto"}))
    fetched, found = actual["kept"], actual["combine"]
    assert value(fetched, "--save") == "out/kept" and value(fetched, "--without") == "el,en"
    assert "kept" in found.inputs and list(actual).index("kept") < list(actual).index("combine")
    words = found.words()
    assert "code=out/kept/code.jsonl" in words and "fi=out/kept/fi.jsonl" in words
    assert not any("out/kept/en" in word or "out/kept/el" in word for word in words)
    assert not found.is_complete() and "kept" not in tasks(write(**AUTO, languages=KEPT))


def test_a_run_looks_at_the_routers_before_it_goes_on(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def execute(words: list[str], *_: object, **__: object) -> int:
        ran.append(words)
        if "combine" in words:
            write_findings(0.2, 0.9)
        return 0

    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", execute)
    monkeypatch.setattr("moelpr.project.running.workflow_of", lambda project, _: complete_workflow(project.file.path))
    monkeypatch.setattr("moelpr.project.running.verdict", lambda project: ",".join(project.models))
    path = write(**AUTO, hardware={"gpu": "none"})
    write_manifests()
    run_here(ResolvedProject(read_project(path)))
    assert [words for words in ran if "stage2" in words] and not [words for words in ran if words == ["-c", "pass"]]


def test_a_gpu_decides_layout_experts_and_the_tokens_of_hours(write: Write) -> None:
    path = write(hardware=GPUS, experts="auto", budget={"hours": 1})
    write_manifests(el=10**9, hu=10**9)
    actual = tasks(path)
    stage1 = actual["stage1"]
    assert (stage1.nodes, stage1.gpus_per_node) == (2, 8)
    assert "--micro-batch-size" in stage1.settings and "--micro-batch-size" not in stage1.words()
    assert value(actual["convert"], "--num-new-experts") == "8"
    speed = ResolvedProject(read_project(path)).layouts.of("stage1").tokens_per_s
    assert value(stage1, "--train-tokens") == str(round(3600 * speed))
    assert stage1.minutes == pytest.approx(60, rel=1e-6)
    # GPUs of one node that share a step
    for steps, gpus in (({}, 8), ({"global-batch-size": 24}, 3), ({"micro-batch-size": [256], "lr": False}, 2)):
        lora = tasks(write(**LORA, hardware=GPUS, steps={"lora": steps}))["lora"]
        assert (lora.nodes, lora.gpus_per_node) == (1, gpus)
    with pytest.raises(UserError, match="steps.lora: .*512 must be a multiple of .*1024"):
        tasks(write(**LORA, hardware=GPUS, steps={"lora": {"micro-batch-size": 1024}}))


def complete_workflow(path: Path) -> Workflow:
    """Tasks whose outputs are complete as soon as they have run."""
    flow = workflow_of(ResolvedProject(read_project(path)))
    for task in flow.tasks.values():
        object.__setattr__(task, "is_complete", lambda: True)
    return flow


def test_layouts_and_logs_redo_nothing_but_text_and_rates_do(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", lambda *_, **__: 0)
    write_manifests()

    def states(path: Path, run: bool = False) -> list[str]:
        flow = complete_workflow(path)
        if run:
            flow.run()
        return [one.task.name for one in flow.outlook() if one.reason and "was removed" not in one.reason]

    assert states(write(), run=True) == []
    assert states(write(steps={"stage1": {"save-interval": 7}, "preprocess": {"workers": 2}})) == []
    assert states(write(steps={"stage2": {"lr": 1e-3}})) == EXPECTED[EXPECTED.index("stage2") :]
    assert states(write(held_out=7)) == ["evaluate", "routing", "card", "report"]
    with open("hu.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert states(write()) == ["preprocess-hu", "replay", *EXPECTED[5:]]
    (Path("base") / "tokenizer.json").write_text('{"model": {}}')
    assert {name for name in EXPECTED if name.startswith("preprocess")} < {*states(write())}


def test_projects_share_text_that_one_of_them_has_made(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", lambda *_, **__: 0)

    def workflow(**changes: Any) -> Workflow:
        return complete_workflow(write(text_output="text", **changes))

    first = workflow()
    text = [task for task in first.tasks.values() if task.name.startswith("preprocess")]
    first.run(text)
    assert value(text[0], "--output-prefix") == "text/data/el" and text[0].name in first.wall_times_s()
    assert "el=text/data/el_validation.jsonl" in first.tasks["evaluate"].words()
    other = workflow(method="full", experts=None, output="other")
    states = {one.task.name: one.state for one in other.outlook()}
    assert [name for name, state in states.items() if state == "done"] == [task.name for task in text]
    assert not Path("other/logs").exists() and not Path("out/logs").exists()
    changed = workflow(method="ffn", experts=None, output="third", steps={"preprocess": {"seed": 9}})
    assert "preprocess-el is shared with other projects, but its command has changed" in changed.outlook()[0].refusal
    for refuses in (changed.run, lambda: plan(ResolvedProject(read_project(Path("languages.yaml"))))):
        with pytest.raises(UserError, match="give all of them the same text.* or another folder than text"):
            refuses()


def test_a_base_of_the_hub_is_there_with_its_weights_and_only_for_its_own_model(write: Write, monkeypatch) -> None:
    monkeypatch.setattr("moelpr.project.resolved.download", lambda name, *_: Path(f"cache of {name}"))
    project = ResolvedProject(read_project(write(model="owner/name", hardware={"gpu": "none"})))
    (task,) = STEPS["download"].tasks(project)
    save_config("Qwen1.5-1.8B", project.base)
    assert not task.is_complete() and project.config_folder() == project.base
    (project.base / "model-00001-of-00002.safetensors").touch()
    assert task.is_complete()
    write_text(project.text / "logs" / "download.json", '{"command": "hf download owner/other --local-dir out/base"}')
    assert project.config_folder() == Path("cache of owner/name")


def test_no_more_text_is_held_out_than_is_needed() -> None:
    assert held_out_share(10**12) == 2e-5 and held_out_share(10**6) == held_out_share(0) == 0.05


def test_a_stage_that_changes_is_redone_with_those_after_it(write: Write) -> None:
    project = ResolvedProject(read_project(write()))
    assert workflow_of(project, "stage1")._redo == {"stage1", "stage2"}
    assert workflow_of(project)._redo == frozenset()


@pytest.mark.parametrize("file", ["config.json", "README.md", "checksums.json", "model.safetensors"])
def test_a_model_that_lacks_a_file_is_not_there(tmp_path: Path, file: str) -> None:
    for name in ("config.json", "README.md", "model.safetensors"):
        (tmp_path / name).write_text("text")
    checksums.write(tmp_path, checksums.sums_of(tmp_path, {"model.safetensors": set()}))  # type: ignore[arg-type]
    assert has_model(tmp_path)
    (tmp_path / "model.safetensors").write_text("tex")
    assert not has_model(tmp_path)
    (tmp_path / "model.safetensors").write_text("text")
    (tmp_path / file).unlink()
    assert not has_model(tmp_path)


@pytest.mark.parametrize("name", ["a.bin", "a.lang", "a.manifest.json"])
def test_a_corpus_that_lacks_a_file_is_not_there(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path / "a", 9)
    for suffix in ("bin", "idx", "lang"):
        (tmp_path / f"a.{suffix}").write_text("1")
    assert has_corpora(tmp_path / "a") and not has_corpora(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a.bin").write_text("")
    assert not has_corpora(tmp_path / "a")
    (tmp_path / "a.bin").write_text("1")
    (tmp_path / name).unlink()
    assert not has_corpora(tmp_path / "a")
