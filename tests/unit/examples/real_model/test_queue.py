"""The queue of the real model runs what it should, in order, past failures; its page shows the evaluation's numbers."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.languages import EXPANDED, LANGUAGES, ORIGINAL
from examples.real_model.__main__ import check_same_settings
from examples.real_model.measurements import collect, merged, missing, parameters
from examples.real_model.page import dump, readme_table, section, trade_off
from examples.real_model.queue import Queue
from examples.real_model.rates import best_rate, search_name
from examples.real_model.settings import (
    ALL,
    BASE,
    LORA_SWITCHED,
    MORE_TEXT,
    RATES,
    REPLAY,
    RIVALS,
    SAME_BYTES,
    SAME_TOKENS,
    STEP_TOKENS,
    VOCABULARY_START,
)
from examples.real_model.signs import Verdict, margin, signs
from examples.real_model.split import split_training_text
from moelpr.base.errors import UserError
from moelpr.measure.evaluate.result_cache import ResultCache
from moelpr.measure.evaluate.routing import Routing
from moelpr.measure.evaluate.scoring import LanguageScore
from moelpr.project.workflow.outlay import listing
from moelpr.project.workflow.workflow import Failure, Workflow

# Bits per byte against base: (expanded, original) on trained kinds, then on the others.
CHANGES: dict[str, tuple[float, ...]] = {
    "copies-stage1": (0.60, 1.00, 0.80, 1.02),
    "copies-seed-1": (0.62, 0.98, 0.82, 1.001),
    "copies-seed-2": (0.62, 0.98, 0.82, 1.003),
    "full": (0.55, 1.10, 0.75, 1.20),
    "one-copy-stage1": (0.60, 1.10, 0.80, 1.05),
    "one-copy-seed-1": (0.61, 1.00, 0.81, 1.06),
}
KINDS = ("help", "interface")


def write_score(
    folder: Path, model: str, text: str, bits_per_byte: float, document_bits: Sequence[float] | None = None
) -> None:
    """As moelpr.measure.evaluate keeps it: ten documents of 100 bytes."""
    shares = [[0.5, 0.3, 0.2]] * 2
    sums = (shares, [[1.0, 0.5, 0.5]] * 2, shares, *[[1.0, 1.0]] * 2, *[[0.0, 0.0]] * 2)
    choice = Routing([0, 1], 10, *sums, num_original_places=2)
    bits = document_bits or [100 * bits_per_byte] * 10
    score = LanguageScore([*bits], [100] * 10, [50] * 10, [5] * 10, 0, choice)
    ResultCache(folder).write(model, text, {}, asdict(score))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A queue's folder after full fine-tuning, of which the search has been done, and stages with two seeds."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "logs").mkdir()
    facts = {"trained": ["help"], "untrained": ["interface"], "languages": {}, "sources": {}}
    (tmp_path / "corpus" / "facts.json").write_text(json.dumps(facts))
    for kind in KINDS:
        for language in LANGUAGES:
            lines = [json.dumps({"text": "a", "id": f"{kind}/{number}"}) + "\n" for number in range(10)]
            (tmp_path / "corpus" / f"held-out.{kind}.{language}.jsonl").write_text("".join(lines))
    for model, changes in {BASE: (1, 1, 1, 1), **CHANGES}.items():
        for number, kind in enumerate(KINDS):
            for language in LANGUAGES:
                change = changes[2 * number + (language in ORIGINAL)]
                write_score(tmp_path / "evaluation", model, f"{language}.{kind}", 2 * change)
        if model == BASE:
            continue
        (tmp_path / model).mkdir()
        steps = [
            {"iteration": n, "step_time_s": 30.0, "peak_memory_gib": 2.0 + n, "learning_rate": 3e-4} for n in (1, 2)
        ]
        (tmp_path / model / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        trained = 1000 if model.endswith(("stage1", "full")) else 10
        (tmp_path / "logs" / f"{model}.log").write_text(f"all    {trained:,}    500\n")
    for rate, bits in zip(RATES["full"], (1.9, 1.8, float("nan")), strict=True):
        for language in EXPANDED:
            write_score(tmp_path / "validation", search_name("full", rate), language, bits)
            write_score(tmp_path / "validation", BASE, language, 2.0)
    return tmp_path


class Started(dict[str, list[str]]):
    """Name of each task that was started -> its command; nothing runs, and those in `fails` fail."""

    fails: tuple[str, ...] = ()

    def __call__(self, words: list[str], log: Path, environment: Any) -> int:
        self[log.stem] = words
        return 3 if log.stem in self.fails else 0


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Started:
    started = Started()
    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", started)
    monkeypatch.setattr("examples.real_model.rates.best_rate", lambda run, setting: 5e-4)
    monkeypatch.setattr(Queue, "tokens_left", lambda self: 0.5)
    return started


def run_all(queue: Queue, setting: str = "") -> list[Failure]:
    """Run the tasks of a setting, by default all, whatever their commands write."""
    tasks = [replace(task, is_complete=lambda: True) for task in queue.tasks() if setting in ("", *task.tags)]
    return Workflow(queue.run, tasks).run(keep_going=True)


def test_what_a_step_reads_was_written_by_an_earlier_one(run: Path, commands: Started) -> None:
    run_all(Queue(run))
    written = {str(run / name) for name in ("base-hf", "corpus", "text", "data")}
    for name, command in commands.items():
        for flag, value in zip(command, command[1:], strict=False):
            path = value.split("=")[-1]
            if flag in ("--pretrained-checkpoint", "--load", "--hf-path", "--model", "--base"):
                assert path in written, f"{name} reads {path}"
            if flag in ("--save", "--run"):
                written.add(path)
    trained = [s for s in ALL.values() if s.name != LORA_SWITCHED]
    assert {f"evaluate-{model}" for s in trained for model in s.models} <= set(commands)
    assert {f"unseen-{setting.name}" for setting in RIVALS if setting.name != LORA_SWITCHED} <= set(commands)


def test_a_plain_base_is_what_all_settings_start_from(run: Path, commands: Started) -> None:
    run_all(Queue(run, is_plain=True))
    names, base = list(commands), str(run / "base-hf")
    train, made = commands["plain-base"], commands["base"]
    assert train[train.index("--pretrained-checkpoint") + 1] == str(run / "tuned-dense")
    assert train[train.index("--data-path") + 1] == str(run / "data" / "plain_text_document")
    assert made[made.index("--save") + 1] == base
    for name in names[names.index("base") + 1 :]:
        assert "tuned" not in " ".join(commands[name]).replace(str(run), "")
        if "--hf-path" in commands[name]:
            assert commands[name][commands[name].index("--hf-path") + 1] == base


def test_a_believable_page_comes_early(run: Path) -> None:
    names = [task.name for task in Queue(run).tasks()]
    models = "base copies-seed-1 full lora one-copy-seed-1 no-lpr-seed-1 plain copies-seed-2".split()
    order = [f"evaluate-{model}" for model in models]
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    assert len(names) == len(set(names))


def test_settings_read_the_same_text_for_as_many_steps_and_baselines_use_the_best_rate(run, commands) -> None:
    run_all(Queue(run, tokens=40 * STEP_TOKENS))

    def values(step: str, *flags: str) -> list[str]:
        return [commands[step][commands[step].index(flag) + 1] for flag in flags]

    trainings = ("copies-stage1", "one-copy-stage1", "random-stage1", "plain", "full", "lora")
    same = [values(step, "--data-path", "--train-iters", "--seed") for step in trainings]
    assert same == [[str(run / "data" / "expanded_text_document"), "40", "1"]] * len(trainings)
    assert values("full", "--lr") == values("lora", "--lr") == ["0.0005"]
    assert values("search-full-0.0003", "--train-iters", "--lr") == ["10", "0.0003"]
    assert values("copies-seed-3", "--seed", "--train-iters") == ["3", "15"]
    assert values("no-lpr-seed-1", "--lpr-loss-coeff") == ["0"]
    assert values(REPLAY, "--lr", "--train-iters", "--data-path") == [*values("full", "--lr"), "55", "1"]
    same = ["10", "0.0001", *values("copies-stage1", "--pretrained-checkpoint", "--data-path")]
    assert values("search-copies-0.0001", "--train-iters", "--lr", "--pretrained-checkpoint", "--data-path") == same
    for name, times in MORE_TEXT.items():
        assert values(f"{name}-stage1", "--train-iters", "--lr") == [str(40 * times), *values("copies-stage1", "--lr")]
        start = str(run / f"{name}-stage1")
        assert values(name, "--pretrained-checkpoint", "--train-iters") == [start, str(15 * times)]


def test_a_failed_setting_leaves_the_others_alone(run: Path, commands: Started) -> None:
    commands.fails = ("one-copy-stage1",)
    (error,) = run_all(Queue(run))
    assert "task one-copy-stage1 exited with code 3" in str(error)
    assert not {"one-copy-seed-1", "no-lpr-seed-1", "reference-seed-2"} & {*commands}
    assert {"copies-seed-3", "random", "plain", "lora"} <= {*commands}


def test_the_best_rate_has_the_lowest_bits_per_byte_and_has_not_diverged(run: Path) -> None:
    assert best_rate(run, "full") == 3e-4
    write_score(run / "validation", search_name("copies", 1e-3), EXPANDED[0], 1.7)  # in progress
    assert "searched" not in collect(run)["settings"]["copies"]["cost"]
    with pytest.raises(UserError, match="lora"):
        best_rate(run, "lora")


@pytest.fixture
def started(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that were started, whose commands are replaced by one that only writes its output."""
    names: list[str] = []
    starts: dict[Path, Path] = {}  # checkpoint -> the one that has its frozen tensors

    def value(words: list[str], flag: str) -> Path:
        return Path(words[words.index(flag) + 1])

    def execute(words: list[str], log: Path, environment: Any) -> int:
        names.append(log.stem)
        if "moelpr.measure.evaluate" in words:
            pairs = [(flag, word.split("=")[0]) for flag, word in zip(words, words[1:], strict=False)]
            for model in [name for flag, name in pairs if flag == "--model"]:
                for data in [name for flag, name in pairs if flag == "--data"]:
                    write_score(value(words, "--output"), model, data, 2.0)
            for name in ("results.json", "harness.json"):
                value(words, "--output").mkdir(exist_ok=True)
                (value(words, "--output") / name).write_text("{}")
            return 0
        for flag in ("--save", "--output-prefix"):
            if flag in words:
                save = value(words, flag)
                save.mkdir(parents=True, exist_ok=True)
                for name in ("FINISHED", "model_spec.json", "config.json"):
                    (save / name).touch()
                Path(f"{save}_text_document.manifest.json").touch()
        if "--pretrained-checkpoint" in words and "--train-everything" not in words:
            starts[value(words, "--save")] = value(words, "--pretrained-checkpoint")
        if "--output" in words:
            value(words, "--output").mkdir(exist_ok=True)
            (value(words, "--output") / "pack.manifest.json").touch()
        for name in ("base-hf", "text", "unseen"):
            (run / name).mkdir(exist_ok=True)
        (run / "base-hf" / "config.json").touch()
        return 0

    def chain(folder: Path) -> list[Path]:
        if not (folder / "model_spec.json").is_file():
            raise UserError(f"{folder} is missing")
        return [folder, *(chain(starts[folder]) if folder in starts else [])]

    monkeypatch.setattr("moelpr.project.workflow.workflow.execute", execute)
    monkeypatch.setattr("examples.real_model.task_maker.checkpoint_chain", chain)
    monkeypatch.setattr(Queue, "tokens_left", lambda self: 0.5)
    for folder in ("evaluation", "validation"):
        shutil.rmtree(run / folder)
    for model in CHANGES:
        shutil.rmtree(run / model)
    return names


@pytest.fixture
def flow(run: Path, started: list[str]) -> Workflow:
    """A queue whose tasks are done. Each has written what counts as its output."""
    flow = Workflow(run, Queue(run, tokens=40 * STEP_TOKENS).tasks())
    flow.run()
    assert started == [*flow.tasks]
    started.clear()
    return flow


@pytest.mark.parametrize(
    ("removed", "made_again"),
    [
        (["search-full-0.0001", "plain", "upcycled-random"], []),  # nobody reads them any more
        (
            ["evaluation/parts/copies-seed-1", "upcycled-copies"],
            ["upcycled-copies", "copies-stage1", "copies-seed-1", "evaluate-copies-seed-1"],
        ),
        (
            ["validation", "full", "evaluation/parts/full"],
            [*(f"evaluate-search-full-{rate:g}" for rate in RATES["full"]), "full", "evaluate-full"],
        ),
        (["continuations", "full-hf"], ["export-full", "continuations"]),
    ],
)
def test_what_was_removed_is_made_again_if_it_is_read(run, flow, started, removed, made_again) -> None:
    for name in removed:
        shutil.rmtree(run / name)
    flow.run()
    # The other searches' results, which nothing reads but the page, were removed with these.
    others = {f"evaluate-search-{x}-{rate:g}" for x in RATES for rate in RATES[x]} if "validation" in removed else set()
    assert {*started} <= {*made_again} | others
    assert [name for name in started if name in made_again] == made_again
    started.clear()
    flow.run()
    assert started == []


def test_other_settings_restore_what_a_chosen_one_reads(run: Path, flow: Workflow, started: list[str]) -> None:
    for name in ("full-hf", "continuations"):
        shutil.rmtree(run / name)
    flow.run([task for task in flow.tasks.values() if "lora" in task.tags])
    assert started == ["export-full", "continuations"]


def test_damaged_records_are_no_traceback(run: Path) -> None:
    damaged = {"logs/evaluate-base.json": "{}", "queue.txt": "\udcff"}
    for path, content in (damaged | {"continuations/results.json": "{", "scores/harness.json": "[]"}).items():
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).write_text(content, errors="surrogateescape")
    tasks = Queue(run).tasks()
    assert "\nevaluate-base " in listing(Workflow(run, tasks), tasks)
    assert "full" in collect(run)["settings"]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("corpus/facts.json", "{", r"facts\.json .*; remove its folder and rerun make results"),
        ("corpus/held-out.help.el.jsonl", "{\n", "held-out text .* is damaged"),
        ("corpus/held-out.help.el.jsonl", '{"id": "a"}\n', "is of other text than"),
        ("full/metrics.jsonl", '{"iteration": 1}\n', "metrics.jsonl is damaged; remove"),
    ],
)
def test_damaged_text_or_metrics_are_one_sentence(run: Path, path: str, content: str, message: str) -> None:
    (run / path).write_text(content)
    with pytest.raises(UserError, match=message):
        collect(run)


def test_a_changed_score_is_not_believed(run: Path) -> None:
    path = run / "evaluation" / "parts" / "full" / "el.help.json"
    path.write_text(path.read_text().replace("110.0", "55.0", 1))
    assert "full" not in collect(run)["settings"]


def test_a_cost_is_left_out_if_a_log_is_gone(run: Path) -> None:
    (run / "logs" / "full.log").unlink()
    assert collect(run)["settings"]["full"]["cost"] == {}


def test_a_folder_belongs_to_one_number_of_tokens(run: Path) -> None:
    for _ in range(2):
        check_same_settings(Queue(run, tokens=4096))
    with pytest.raises(UserError, match="--tokens 4096"):
        check_same_settings(Queue(run, tokens=8192))


def test_the_validation_part_is_not_trained_on(tmp_path: Path) -> None:
    lines = [json.dumps({"text": str(number)}) + "\n" for number in range(500)]
    (tmp_path / "source.jsonl").write_text("".join(lines))
    split_training_text(tmp_path / "source.jsonl", tmp_path, "el")
    parts = [(tmp_path / f"{name}.el.jsonl").read_text().splitlines(keepends=True) for name in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(lines)
    assert len(parts[1]) == 10


def test_numbers_are_changes_against_base_by_kind_and_group(run: Path) -> None:
    results = collect(run)
    copies = results["settings"]["copies"]
    assert [model["means"]["out"]["original"][0] for model in copies["models"].values()] == [0.001, 0.003]
    assert copies["models"]["copies-seed-1"]["change"]["el.help"] == pytest.approx([-0.38] * 3)
    # Stage 1 and stage 2 of the first seed, two steps of 30 s each; the larger of both is the number of parameters.
    cost = copies["cost"]
    assert (cost["tokens"], cost["minutes"], cost["trained_parameters"]) == (4 * STEP_TOKENS, 2.0, 1000)
    assert results["settings"]["full"]["cost"]["rates"] == [3e-4]
    assert {"LoRA, largest rank", "MoE-LPR, K copies: 1 of 3 seeds"} <= {*missing(results)}
    assert results["routing"]["copies"]["original_first_share"]["en"] == [0.8, 0.8]
    assert json.loads(dump(results)) == json.loads(json.dumps(results))


def test_an_extended_vocabulary_reads_as_much_text_or_as_many_tokens(run, commands, monkeypatch) -> None:
    monkeypatch.setattr(Queue, "tokens_left", lambda self: 360 / 900)
    run_all(Queue(run, tokens=100 * STEP_TOKENS))

    def steps(name: str) -> list[int]:
        found = [commands[f"{name}{stage}"] for stage in ("-stage0", "-stage1", "")]
        return [int(command[command.index("--train-iters") + 1]) for command in found]

    assert steps(SAME_TOKENS) == [20, 80, 38]
    assert steps(SAME_BYTES) == [8, 32, 38]
    blend = commands[f"{SAME_BYTES}-stage0"]
    data = str(run / "data" / "extended-")
    assert " ".join(blend[blend.index("--data-path") + 1 :]).startswith(
        f"4 {data}expanded_text_document 1 {data}original_text_document --save"
    )


def test_the_tokens_that_are_left_are_those_of_the_corpora(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {"expanded": 900, "extended-expanded": 360}

    def read(prefix: Path) -> Any:
        number = tokens.get(prefix.name.removesuffix("_text_document"))
        return None if number is None else SimpleNamespace(tokens=number)

    monkeypatch.setattr("examples.real_model.task_maker.Manifest.read", read)
    assert Queue(run).tokens_left() == 0.4
    del tokens["extended-expanded"]
    with pytest.raises(UserError, match="has no manifest; remove .*preprocess-extended-expanded.json"):
        Queue(run).tokens_left()


def test_the_readme_has_the_means_of_what_is_done(run: Path) -> None:
    rows = [line for line in readme_table(collect(run)).splitlines() if line.startswith("|")]
    assert len(rows) == 4  # the head and two settings
    assert [cell.strip() for cell in rows[2].split("|")[1:-1]] == ["MoE-LPR", "−38.0%", "+0.2%"]


def test_the_page_compares_vocabularies(run: Path) -> None:
    for text in [f"{language}.{kind}" for kind in KINDS for language in LANGUAGES]:
        write_score(run / "evaluation", VOCABULARY_START, text, 2.2)
    page = section(collect(run))
    part = page[page.index("### With an extended vocabulary") :]
    row = next(line for line in part.splitlines() if line.startswith("| base"))
    assert row.count(" 2.00 |") == len(LANGUAGES)
    row = next(line for line in part.splitlines() if "before training" in line)
    assert row.count(" +10.0% [") == 4
    assert "extended vocabulary, same bytes" in missing(collect(run))


def test_machines_share_the_work(run: Path) -> None:
    """What only the other one has is kept; what both have is the newer."""
    here = collect(run)
    one, other = json.loads(dump(here)), json.loads(dump(here))
    del one["settings"]["full"], one["settings"]["copies"]["models"]["copies-seed-2"], one["routing"]["copies"]
    del other["settings"]["one-copy"], other["settings"]["copies"]["models"]["copies-seed-1"]
    other["settings"]["copies"]["cost"] = {}
    assert dump(merged(one, other)) == dump(here) == dump(merged(other, one))
    assert list(merged(one, other)["settings"]) == list(here["settings"])
    other["settings"]["full"]["label"] = "of before"
    assert merged(here, other)["settings"]["full"]["label"] == "full fine-tuning"
    assert merged(here, {}) is here


@pytest.mark.parametrize("key, value", [("tokens", 1), ("kinds", {"in": ["help"], "out": ["stories"]}), ("base", 2.1)])
def test_numbers_of_another_comparison_are_not_mixed(run: Path, key: str, value: Any) -> None:
    results = collect(run)
    other = json.loads(dump(results))
    if key == "base":
        other["base"]["el.help"][0] = value
    else:
        other[key] = value
    with pytest.raises(UserError, match="another base, other text or another number of tokens"):
        merged(results, other)


def test_an_evaluation_in_progress_is_left_out_unless_it_is_the_bases(run: Path) -> None:
    parts = run / "evaluation" / "parts"
    (parts / "copies-stage1" / "en.interface.json").unlink()
    results = collect(run)
    assert "copies-stage1" not in {*results["settings"], *results["routing"]} and "copies" in results["routing"]
    (parts / BASE / "en.interface.json").unlink()
    with pytest.raises(UserError, match="evaluation of the base .* not complete"):
        collect(run)


def test_predictions_are_marked_by_the_numbers(run: Path) -> None:
    found = {sign.text: sign for sign in signs(collect(run))}

    def verdicts(start: str) -> list[Verdict]:
        return [sign.verdict for text, sign in found.items() if text.startswith(start)]

    assert verdicts("review improves the original languages over stage 1 (K copies)") == [Verdict.SEEN]
    assert verdicts("review improves the original languages over stage 1 (1 copy)") == [
        Verdict.NOT_SEEN
    ]  # +6% after +5%
    assert verdicts("the LPR loss keeps") == [Verdict.MISSING]
    assert verdicts("expanded languages at least") == [Verdict.SEEN, Verdict.SEEN]
    assert verdicts("each original language within 1%") == [Verdict.SEEN]
    assert verdicts("MoE-LPR keeps the original languages better than full fine-tuning without") == [Verdict.SEEN]
    assert verdicts("MoE-LPR learns comparably") == [Verdict.SEEN]  # 38% of 45%


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [(0.006, Verdict.SEEN), (0.004, Verdict.CLOSE), (-0.004, Verdict.CLOSE), (-0.006, Verdict.NOT_SEEN)],
)
def test_a_difference_that_seeds_make_is_no_sign(run: Path, difference: float, verdict: Verdict) -> None:
    results = collect(run)
    for name, value in (("copies", -0.01), ("copies-stage1", -0.01 + difference)):
        for model in results["settings"][name]["models"].values():
            model["means"]["out"]["original"][0] = value
    sign = next(sign for sign in signs(results) if "(K copies)" in sign.text)
    assert sign.verdict == verdict


def test_what_seeds_change_is_measured(run: Path) -> None:
    results = collect(run)
    first, second = results["settings"]["copies"]["models"].values()
    assert margin(results) == 0.005  # two seeds differ by 0.2 points
    second["means"]["out"]["original"][0] = first["means"]["out"]["original"][0] + 0.01
    assert margin(results) == pytest.approx(0.01)


def test_who_learns_nothing_is_not_comparable_to_who_learns_less(run: Path) -> None:
    results = collect(run)
    for name, value in (("copies", 0.03), ("full", 0.05)):
        for model in results["settings"][name]["models"].values():
            model["means"]["in"]["expanded"][0] = value
    sign = next(sign for sign in signs(results) if sign.text.startswith("MoE-LPR learns comparably"))
    assert sign.verdict == Verdict.NOT_SEEN


def test_the_page_shows_ranges_over_seeds_and_names_what_is_missing(run: Path) -> None:
    page = section(collect(run))
    row = next(line for line in page.splitlines() if line.startswith("| MoE-LPR, K copies  "))
    assert "+0.2% (+0.1% to +0.3%)" in row and "−38.0%" in row
    assert "Not done yet: MoE-LPR, K copies: 1 of 3 seeds" in page
    assert "0.0001 −5.0%, 0.0003 −10.0%" in page
    assert page.index("not seen") < page.index("| change against base")
    svg = trade_off(collect(run))
    assert "stage 2: −38.0% and +0.2%" in svg.replace("\n", " ")


def test_rates_of_other_languages_stand_on_the_page(run: Path) -> None:
    rate = {"rate": {"value": 0.25, "low": 0.1, "high": 0.5}, "decided": 16, "undecided": 2}
    (run / "wrong-language").mkdir()
    found = {"wrong_language": {"es": {"copies-seed-1": rate, "the text itself": rate}}}
    (run / "wrong-language" / "results.json").write_text(json.dumps(found))
    row = next(line for line in section(collect(run)).splitlines() if line.startswith("| es"))
    assert row.count("25% [10%, 50%] of 16") == 2


def test_parameters_are_those_a_run_printed() -> None:
    assert parameters("x\nall        238,965,120     134,515,008\n") == (238_965_120, 373_480_128)
    assert parameters("rank 192, 58,613,760 trained parameters of 134,515,008\n") == (58_613_760, 134_515_008)
    assert parameters("all    1    2\nstage1 is finished\nall    1,000    500\n") == (1000, 1500)  # the last start
    assert parameters("nothing") is None


def test_translations_are_drawn_together(run: Path) -> None:
    """A mean over languages whose documents are translations of each other is no surer than one language."""
    noise = [0.5 + number / 10 for number in range(10)]  # bits of documents, the same in every language
    for language in LANGUAGES:
        write_score(run / "evaluation", "full", f"{language}.help", 0.0, [100 * bits for bits in noise])
    found = collect(run)["settings"]["full"]["models"]["full"]
    widths = [high - low for _, low, high in (found["change"]["el.help"], found["means"]["in"]["expanded"])]
    assert widths[0] > 0.1 and widths[1] == pytest.approx(widths[0], rel=0.15)
