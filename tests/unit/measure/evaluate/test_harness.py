"""lm-evaluation-harness on a tiny model and local tasks, with nothing fetched; and the shape of the results."""

import json
import re
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from moelpr.base.languages import canonical
from moelpr.measure.evaluate.benchmarks import PAPER_TASKS, Benchmark, installed_benchmarks, read_benchmarks
from moelpr.measure.evaluate.harness_results import HarnessResults
from moelpr.measure.evaluate.models import load_model
from moelpr.measure.report.evaluation_files import EvaluationFile

needs_lm_eval = pytest.mark.skipif(
    not (find_spec("lm_eval") and find_spec("accelerate")), reason="needs lm-evaluation-harness (the extra `eval`)"
)
QUESTIONS = [
    ("Is it on", ["yes", "no", "dim"], 0),
    ("Door", ["open", "shut", "ajar"], 2),
    ("Light", ["on", "off", "x"], 1),
]

TASK = """
{test_split: test, output_type: multiple_choice, doc_to_text: "{{question}}", doc_to_choice: "{{choices}}",
doc_to_target: "{{gold}}", metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]}
"""


@pytest.fixture
def local_tasks(tmp_path) -> Path:
    """Two tasks of multiple choice with their data, one of them in a group, and a table that names them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for language in ("en", "el"):
        rows = [{"question": text + language, "choices": choices, "gold": gold} for text, choices, gold in QUESTIONS]
        (folder / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = {"data_files": {"test": f"{folder}/{language}.jsonl"}}
        task = yaml.safe_load(TASK) | {"task": f"door_{language}", "dataset_path": "json", "dataset_kwargs": data}
        (folder / f"door_{language}.yaml").write_text(yaml.safe_dump(task))
    metric = "[{metric: acc, weight_by_size: true}]"
    (folder / "doors_el.yaml").write_text(f"group: doors_el\ntask: [door_el]\naggregate_metric_list: {metric}\n")
    table = "Doors:\n  num_fewshot: 0\n  metric: acc\n  tasks: {en: door_en, el: [doors_el]}\n"
    (tmp_path / "table.yaml").write_text(table)
    return folder


def accuracy(directory: Path, language: str) -> float:
    """Fraction of questions whose correct answer is the most likely, by a plain loop; a space precedes each answer."""
    loaded = load_model(directory, "cpu")
    right = 0
    for question, choices, gold in QUESTIONS:
        scores = []
        for choice in choices:
            asked = loaded.tokenizer(question + language)["input_ids"]
            ids = loaded.tokenizer(f"{question}{language} {choice}")["input_ids"]
            with torch.no_grad():
                log_probabilities = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_probabilities[at - 1, ids[at]].item() for at in range(len(asked), len(ids))))
        right += scores.index(max(scores)) == gold
    return right / len(QUESTIONS)


@pytest.fixture
def stub_lm_eval(monkeypatch) -> list[tuple[str, int]]:
    """In place of lm_eval: two tasks, of which `broken` has no data; what is run is listed as (task, shots)."""
    ran = []

    class TaskManager:
        all_tasks = ("door", "broken")

        def __init__(self, **_: object):
            pass

        def load(self, names: list[str]) -> dict[str, dict]:
            if names == ["broken"]:
                raise OSError("no network\nat all")
            return {"groups": {}, "tasks": dict.fromkeys(names, names[0])}

    def simple_evaluate(*, tasks: list[str], num_fewshot: int, **_: object) -> dict:
        ran.append((tasks[0], num_fewshot))
        return {"results": {tasks[0]: {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "x"}}}

    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0" if name == "lm_eval" else version(name))
    for name, content in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **_: None},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    return ran


def test_results_are_kept_and_tasks_that_cannot_run_are_rejected(
    stub_lm_eval, rejected, evaluate, tmp_path, dense_dir, moe_dir
):
    table = tmp_path / "table.yaml"
    models = ("--model", dense_dir, "--model", moe_dir, "--languages", "en,el", "--original-languages", "en")
    arguments = ("harness", *models, "--tasks", table, "--output", tmp_path / "out")
    table.write_text("Doors: {num_fewshot: 3, metric: acc, tasks: {en: door}}")
    evaluate(*arguments)
    evaluate(*arguments)
    assert stub_lm_eval == [("door", 3), ("door", 3)]
    content = json.loads((tmp_path / "out/harness.json").read_text())
    scores = content["models"]["moe"]["scores"]["Doors"]["en"]
    assert (scores["value"], scores["stderr"]) == (50, 10) and scores["low"] < 35 and scores["high"] > 65
    assert scores["change"]["value"] == 0, "without numbers of single questions, the same scores vary alike"
    assert content["benchmarks"]["Doors"] == {"num_fewshot": 3, "metric": "acc", "tasks": {"en": ["door"]}}
    table.write_text("Doors: {num_fewshot: 4, metric: acc, tasks: {en: door}}")
    for changed in ((), ("--limit", 2), ("--dtype", "bfloat16")):
        stub_lm_eval.clear()
        evaluate(*arguments, *changed)
        assert stub_lm_eval == [("door", 4), ("door", 4)], changed
    for changed, expected in [
        ("f1, tasks: {en: door}", ("acc", "f1")),
        ("acc, tasks: {en: bell}", ("bell", "--tasks")),
        ("acc, tasks: {en: broken}", ("broken", "no network")),
    ]:
        table.write_text(f"Doors: {{num_fewshot: 3, metric: {changed}}}")
        message = rejected(*arguments)
        assert all(part in message for part in expected)


@needs_lm_eval
def test_local_tasks_run_offline_and_their_results_are_kept(
    evaluate, capsys, tmp_path, local_tasks, dense_dir, moe_dir
):
    models = ("--model", f"base={dense_dir}", "--model", moe_dir, "--languages", "en,el", "--original-languages", "en")
    tasks = ("--tasks", tmp_path / "table.yaml", "--include-path", local_tasks)
    arguments = (*models, *tasks, "--output", tmp_path / "out")
    evaluate("harness", *arguments)
    content = json.loads((tmp_path / "out/harness.json").read_text())["models"]
    for name, directory in (("base", dense_dir), ("moe", moe_dir)):
        for language in ("en", "el"):
            actual = content[name]["scores"]["Doors"][language]["value"]
            assert actual == pytest.approx(100 * accuracy(directory, language))
        assert content[name]["averages"]["original"] == content[name]["scores"]["Doors"]["en"]["value"]
    assert "base: door_en, 0 shots" in capsys.readouterr().out
    evaluate("harness", *arguments)
    assert not re.search(": doors?_.* shots", capsys.readouterr().out)
    with open(local_tasks / "el.jsonl", "a") as file:
        file.write("\n" + json.dumps({"question": "Gate", "choices": ["open", "shut"], "gold": 0}))
    evaluate("harness", *arguments)
    assert "base: doors_el, 0 shots" in capsys.readouterr().out
    assert "Expanded languages" in (tmp_path / "out/harness.md").read_text()
    # Two processes: the same scores, and one that is killed loses only the task that it runs.
    shutil.rmtree(tmp_path / "out/parts/moe")
    one = json.loads((tmp_path / "out/harness.json").read_text())
    again = (*models, *tasks, "--output", tmp_path / "two", "--num-processes", 2)
    evaluate("harness", *again)
    assert json.loads((tmp_path / "two/harness.json").read_text()) == one
    assert {path.stem for path in (tmp_path / "two/parts/moe").iterdir()} == {"harness%20door_en", "harness%20doors_el"}
    numbers = json.loads((tmp_path / "two/parts/moe/harness%20door_en.json").read_text())["result"]["documents"]["acc"]
    assert 100 * sum(numbers) / len(numbers) == pytest.approx(one["models"]["moe"]["scores"]["Doors"]["en"]["value"])


@needs_lm_eval
def test_the_harness_has_every_task_of_the_papers_table():
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    table = yaml.safe_load(PAPER_TASKS.read_text())
    languages = {language for entry in table.values() for language in entry["tasks"]}
    benchmarks = read_benchmarks(PAPER_TASKS, sorted(languages))
    named = {task for benchmark in benchmarks.values() for tasks in benchmark.tasks.values() for task in tasks}
    assert named - known == set()
    # And every translation that the harness has, by the forms of their names.
    for benchmark, forms in {
        "ARC": ("arc_([a-z]{2,3})", "arc_([a-z]{2,3})_challenge", "arc_challenge_mt_([a-z]{2,3})"),
        "MMLU": ("m_mmlu_([a-z]{2,3})", "global_mmlu_full_([a-z]{2,3})"),
        "HellaSwag": ("hellaswag_([a-z]{2,3})",),
        "Belebele": ("belebele_([a-z]{3}_[A-Z][a-z]{3})",),
        "FLORES": ("[a-z]+_bench_flores_en-([a-z]{2})",),
    }.items():
        actual = {canonical(match[1]) for form in forms for task in known if (match := re.fullmatch(form, task))}
        assert actual - benchmarks[benchmark].tasks.keys() == set()


@needs_lm_eval
def test_all_tasks_are_those_of_the_installed_harness_under_one_code():
    actual = installed_benchmarks(["eu", "gl", "el", "zh", "ja"])
    assert actual["XStoryCloze"].tasks == {"eu": ["xstorycloze_eu"], "gl": ["xstorycloze_gl"], "zh": ["xstorycloze_zh"]}
    assert actual["XNLI"].tasks.keys() == {"eu", "gl", "el", "zh"} and actual["XCOPA"].tasks.keys() == {"eu", "zh"}
    assert actual["XWinograd"].tasks["ja"] == ["xwinograd_jp"] and actual["Belebele"].num_fewshot == 5


@needs_lm_eval
def test_a_task_that_would_ignore_the_number_of_shots_is_rejected(rejected, tmp_path, local_tasks, dense_dir):
    """The harness took 0, and the table said 2."""
    base = ("--model", dense_dir, "--languages", "en", "--original-languages", "en", "--include-path", local_tasks)
    for task in local_tasks.glob("*.yaml"):
        task.write_text(task.read_text() + "\nnum_fewshot: 0\n")
    table = tmp_path / "table.yaml"
    table.write_text(table.read_text().replace("num_fewshot: 0", "num_fewshot: 2"))
    assert "sets num_fewshot to 0" in rejected("harness", *base, "--tasks", table)


def test_languages_of_fineweb_2_have_their_benchmarks_under_any_code(tmp_path):
    benchmarks = read_benchmarks(PAPER_TASKS, [canonical(code) for code in ("eus_Latn", "glg", "isl_Latn", "no", "nb")])
    assert benchmarks["Belebele"].tasks["eu"] == ["belebele_eus_Latn"]
    assert benchmarks["FLORES"].tasks["gl"] == ["galician_bench_flores_en-gl", "galician_bench_flores_gl-en"]
    assert benchmarks["ARC"].tasks["is"] == ["arc_challenge_mt_is"]
    assert benchmarks["MMLU"].tasks["no"] == benchmarks["MMLU"].tasks["nb"] == ["m_mmlu_nb"]
    table = tmp_path / "table.yaml"  # also in a table that names languages as its tasks do
    table.write_text("Doors: {num_fewshot: 0, metric: acc, tasks: {ell_Grek: door}}")
    assert read_benchmarks(table, ["el"])["Doors"].tasks == {"el": ["door"]}


def harness_results(benchmarks, languages, original, scores, limit=None) -> HarnessResults:
    models, settings = {name: Path(name) for name in scores}, {"limit": limit, "include_path": None}
    return HarnessResults(models, benchmarks, languages, original, scores, settings)


def test_averages_are_over_languages_first_and_then_over_benchmarks(tmp_path):
    benchmarks = {
        "A": Benchmark(25, "acc_norm", {"en": ["a_en"], "es": ["a_es"], "el": ["a_el"]}),
        "B": Benchmark(8, "chrf", {"en": ["b_in", "b_out"]}),
    }
    numbers = {"a_en": 0.2, "a_es": 0.4, "a_el": 0.5}
    base = {task: {"acc_norm": number, "acc_norm_stderr": 0.03} for task, number in numbers.items()}
    base |= {"b_in": {"chrf": 40.0, "chrf_stderr": 3.0}, "b_out": {"chrf": 60.0, "chrf_stderr": 4.0}}
    ours = {task: {name: value + 0.1 for name, value in result.items()} for task, result in base.items()}
    results = harness_results(benchmarks, ["en", "es", "el"], ["en", "es"], {"base": base, "ours": ours}, limit=5)
    assert results.means("base", "original")[-1][0] == pytest.approx((30 + 50) / 2)
    assert results.means("base", "expanded")[-1][0] == pytest.approx(50)
    assert results.means("ours", "original")[-1][0] == pytest.approx((40 + 50.1) / 2)
    flores = results.numbers().models["base"].scores["B"]["en"]
    assert (flores.value, flores.stderr) == (pytest.approx(50), pytest.approx(2.5))
    assert (flores.low, flores.high) == (pytest.approx(45.1, abs=0.5), pytest.approx(54.9, abs=0.5))
    scores = {"base": {task: {"chrf": 40.0} for task in ("b_in", "b_out")}}
    unknown = harness_results({"B": benchmarks["B"]}, ["en"], ["en"], scores)
    assert json.loads(unknown.json_text())["models"]["base"]["scores"]["B"]["en"]["stderr"] is None
    (tmp_path / "harness.json").write_text(results.json_text())
    assert EvaluationFile.read(tmp_path / "harness.json") == results.numbers()
    assert unknown.tables()["B, 8 shots, chrf"].rows[0][1] == "40.00 ± –"
    findings, tables = results.findings(), results.tables()
    assert any(re.search(r"Expanded .* ours .* 60\.00 .* \+10\.00 \[.* base", finding) for finding in findings)
    assert any(finding.startswith("B ") and "Greek, Spanish" in finding for finding in findings)
    assert "first 5 questions" in tables["A, 25 shots, acc_norm"].note
    assert tables["Expanded languages"].rows[0] == ["base", "50.00", "–", "50.00", ""]


def test_changes_are_paired_by_question_over_translations_too():
    """The interval of a change is that of the differences of questions: far narrower than that of the scores."""
    benchmarks = {"A": Benchmark(0, "acc", {"en": ["a_en"], "el": ["a_el"]})}
    right = {"a_en": [1.0] * 60 + [0.0] * 40, "a_el": [1.0] * 50 + [0.0] * 50}
    better = {
        task: [1.0 if place >= 95 else number for place, number in enumerate(actual)] for task, actual in right.items()
    }
    scores = {
        model: {task: {"acc": sum(actual) / 100, "documents": {"acc": actual}} for task, actual in by_task.items()}
        for model, by_task in (("base", right), ("ours", better))
    }
    results = harness_results(benchmarks, ["en", "el"], ["en"], scores)
    content = json.loads(results.json_text())["models"]["ours"]
    change = content["scores"]["A"]["en"]["change"]
    assert change["value"] == pytest.approx(5)
    assert (change["low"], change["high"]) == (pytest.approx(1, abs=1), pytest.approx(9.3, abs=1))  # ± 1.96 √(5 · 0.95)
    assert content["scores"]["A"]["en"]["high"] - content["scores"]["A"]["en"]["low"] == pytest.approx(18.9, abs=1.5)
    assert content["average_changes"]["expanded"]["low"] == pytest.approx(change["low"]), "the same samples"


def test_bad_tables_and_arguments_are_rejected_with_what_to_correct(rejected, tmp_path, dense_dir, dense_spec):
    dense_spec.write(tmp_path)
    model, english = ("--model", dense_dir), ("--languages", "en", "--original-languages", "en")
    for arguments, expected in [
        ((*model, "--languages", "en", "--original-languages", "fr"), "--original-languages fr"),
        ((*model, "--languages", "xx", "--original-languages", "xx"), "xx"),
        ((*model, *english, "--limit", 0), "--limit"),
        ((*model, *english, "--preset", "all", "--tasks", "x"), "--preset and --tasks"),
        ((*model, *english, "--tasks", tmp_path / "no"), "/no"),
        (("--model", tmp_path / "nowhere", *english), "nowhere"),
        (("--model", tmp_path, *english), "moelpr model export"),
    ]:
        assert expected in rejected("harness", *arguments)
    two = [f"ARC {n}: {{num_fewshot: {n}, metric: acc, tasks: {{en: arc_challenge}}}}\n" for n in (0, 25)]
    for content, expected in [
        ("- ARC\n", "table.yaml"),
        ("ARC: {num_fewshot: 25, tasks: {en: arc_challenge}}\n", "ARC.metric"),
        ("ARC: {num_fewshot: 1, metric: acc, tasks: {en: []}}\n", "ARC.tasks.en"),
        ("".join(two), "0 and 25 shots"),
    ]:
        (tmp_path / "table.yaml").write_text(content)
        assert expected in rejected("harness", *model, *english, "--tasks", tmp_path / "table.yaml")
