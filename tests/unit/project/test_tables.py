"""The text of `moelpr plan` and `moelpr status`, and the folders that steps agree on."""

from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.base.quantities import format_minutes
from moelpr.model.model_spec import MoeSpec
from moelpr.plan.stage_plan import parameters
from moelpr.project import tables
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.steps import tasks_of
from moelpr.project.workflow.task import Task
from tests.support.hf_models import edit_json
from tests.unit.project.conftest import Write


def test_the_sum_of_a_plan_leaves_out_trainings_whose_time_is_unknown(write: Write) -> None:
    on_a_cpu = tables.plan(ResolvedProject(read_project(write()))).split("Left: ")[1]
    assert " s without steps marked –, " in on_a_cpu
    project = ResolvedProject(read_project(write()))
    assert tables.status(project).endswith(" s without steps marked –.")
    assert "_base" not in vars(project.layouts)  # reading it takes longer than all else
    hardware = {"gpu": "h100-80", "gpus": 8}
    for budget in ({"tokens": "6K"}, {"epochs": 1}, {"hours": 1e-5}):
        known = tables.plan(ResolvedProject(read_project(write(hardware=hardware, budget=budget))))
        times = dict(line.split()[:1] + line.split()[3:4] for line in known.splitlines() if "  to do " in line)
        assert times["stage1"] != "–" and times["stage2"] == times["export"] == "–", budget


def test_a_plan_adds_up_the_copies_of_remote_text_that_steps_will_make(write: Write, monkeypatch) -> None:
    versions = {"hf://a": "3221225472 x", "hf://b": "1073741824 y"}
    tasks = [
        Task(name="a", command=[], versions=versions),
        Task(name="b", command=[], versions=dict([*versions.items()][:1])),
    ]
    monkeypatch.setattr(tables, "tasks_of", lambda project: tasks)
    assert ", and 4 GiB in the cache" in tables.plan(ResolvedProject(read_project(write())))


@pytest.mark.parametrize(
    ("minutes", "text"),
    [(None, "–"), (0, "0 s"), (0.2, "12 s"), (1, "1 minute"), (90, "90 minutes"), (150, "2.5 hours"), (2880, "2 days")],
)
def test_a_time_is_in_its_largest_unit(minutes: float | None, text: str) -> None:
    assert format_minutes(minutes) == text


def test_a_corpus_has_the_name_that_its_key_gives_it(write: Write) -> None:
    """`moelpr data preprocess --json-keys content` writes PREFIX_content_document."""
    Path("en.jsonl").write_text(100 * '{"content": "text"}\n')
    languages = {"expanded": {"el": "el.jsonl"}, "original": {"en": {"text": "en.jsonl", "json_key": "content"}}}
    places = ResolvedProject(read_project(write(languages=languages)))
    assert places.corpus("en").name == "en_content_document" and places.corpus("el").name == "el_text_document"
    assert places.corpus("en_validation").name == "en_validation_content_document"
    (replay,) = [task for task in tasks_of(places) if task.name == "replay"]
    assert "out/data/en_content_document" in replay.words()


def test_a_further_round_keeps_the_experts_of_its_base(write: Write) -> None:
    """All experts of an MoE are original, so it has no copies to choose: in the plan, and in the command of convert."""
    path = write(hardware={"gpu": "h100-80", "gpus": 8}, experts={"new": 2})
    moe = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 4}
    moe |= {"num_experts_per_tok": 2, "moe_intermediate_size": 5504, "shared_expert_intermediate_size": 0}
    moe |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 4}
    edit_json(Path("base/config.json"), **moe)
    places = ResolvedProject(read_project(path))
    assert places.layouts.of("stage1").plan is not None
    (convert,) = [task for task in tasks_of(places) if task.name == "convert"]
    assert "--original-copies" not in convert.words()
    one_choice = ResolvedProject(read_project(write(hardware={"gpu": "h100-80", "gpus": 8}, experts={"topk": 1})))
    with pytest.raises(UserError, match=r"line \d+: model: base is an MoE"):
        one_choice.layouts.of("ffn")


def test_a_second_ffn_trains_as_a_dense_model_and_leaves_a_token_the_parameters_of_its_base(write: Write) -> None:
    path = write(hardware={"gpu": "h100-80", "gpus": 8}, experts={"topk": 1}, budget={"tokens": "6K"})
    places = ResolvedProject(read_project(path))
    ffn, base = places.layouts.of("ffn"), places.layouts.of("ffn").plan.spec
    assert base.moe is None and ffn.tokens_per_s
    assert places.layouts.result.moe == MoeSpec(1, 1, tuple(range(24)))
    numbers = dict(zip(("all", "active"), parameters(places.layouts.result), strict=True))
    (dense, _), routers, second = parameters(base), 24 * 2 * 2048, 24 * 3 * 2048 * 5504
    assert numbers == {"all": dense + routers + second, "active": dense + routers}
    text = tables.plan(places)
    assert "N = 1 (auto) in each of 24 layers, K = 1" in text and "Stage ffn reads 6K tokens" in text
    path = write(
        hardware={"gpu": "h100-80", "gpus": 8}, method="second-ffn", experts="per-language", budget={"tokens": "6K"}
    )
    two = ResolvedProject(read_project(path))
    assert parameters(two.layouts.result)[0] == dense + 24 * 3 * 2048 + 2 * second
    text = tables.plan(two)
    assert "N = 2 (auto)" in text and "Stage ffn-el reads 6K" in text and "Stage ffn-hu reads 6K" in text


def test_all_steps_share_one_run_in_trackers(write: Write) -> None:
    places = ResolvedProject(read_project(write(trackers={"wandb_project": "p", "mlflow_experiment": "e"})))
    tasks = {task.name: [*task.settings] if task.name in places.stages else task.words() for task in tasks_of(places)}
    for step in (*places.stages, "track"):
        words = tasks[step]
        flags = {
            flag: words[words.index(flag) + 1] for flag in ("--tracker-run", "--wandb-project", "--mlflow-experiment")
        }
        assert flags == {"--tracker-run": "out/tracker.json", "--wandb-project": "p", "--mlflow-experiment": "e"}
    without = tasks_of(ResolvedProject(read_project(write())))
    assert "track" not in [task.name for task in without]
