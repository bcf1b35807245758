"""The card contains what the runs recorded, and nothing else."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from checkpoint_convert.adapter import adapter_to_mcore, mcore_to_adapter
from checkpoint_convert.export import mcore_to_hf, whole_checkpoint
from checkpoint_convert.model_card import read_history
from checkpoint_convert.upcycling import Start, hf_to_mcore
from moelpr.checkpoints import BaseCheckpoint
from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec

BASE_CARD = "---\nlicense: other\nlicense_name: tongyi\nlanguage:\n- en\n- zh\ntags: [chat]\n---\n# The base\n"
SETTINGS = {
    "stage": "stage1",
    "data_path": ["3", "data/el_text_document", "1", "data/hu_text_document"],
    "global_batch_size": 512,
    "seq_length": 1024,
    "lr": 5e-5,
    "min_lr": 0.0,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 20,
    "balance_loss_coeff": 0.01,
    "lpr_loss_coeff": 0.0,
    "lpr_loss": "paper",
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "bf16": True,
    "fp16": False,
    "seed": 1234,
    "world_size": 8,
    "train_everything": False,
    "is_resumed": False,
    "ckpt_step": None,
}


@pytest.fixture
def runs(make_qwen2: Callable[..., Path], tmp_path: Path, monkeypatch) -> Path:
    """A base with a card of its own, the upcycled checkpoint, and two stages as the trainer leaves them."""
    base = Path(shutil.copytree(make_qwen2(tokenizer=True), tmp_path / "Qwen-tiny"))
    (base / "README.md").write_text(BASE_CARD)
    monkeypatch.chdir(tmp_path)  # the records name the folders as the user did
    hf_to_mcore(base, Path("upcycled"), num_new_experts=3, start=Start(seed=7))
    write_run("stage1", "upcycled", [3, 6], SETTINGS)
    stage2 = {
        "stage": "stage2",
        "data_path": ["data/review_text_document"],
        "balance_loss_coeff": 0.0,
        "lpr_loss_coeff": 0.1,
    }
    write_run("stage2", "stage1", [4], SETTINGS | stage2)
    return tmp_path


def write_run(name: str, start: str, steps: list[int], settings: dict, resumed: tuple[int, ...] = ()) -> None:
    """A run of one stage whose weights are those it started from."""
    save, source = Path(name), Path(start)
    save.mkdir()
    shutil.copytree(source / "hf", save / "hf")
    shutil.copyfile(source / "model_spec.json", save / "model_spec.json")
    weights = next(folder for folder in sorted(source.iterdir(), reverse=True) if (folder / ".metadata").is_file())
    settings = settings | {"save": name, "pretrained_checkpoint": start}
    for step in steps:
        shutil.copytree(weights, save / f"iter_{step:07d}")
        is_resumed = step in resumed
        record = settings | {"is_resumed": is_resumed, "model_source": name if is_resumed else start}
        for folder in (save, save / f"iter_{step:07d}"):
            (folder / "recipe.yaml").write_text(yaml.safe_dump(record))
    (save / "latest_checkpointed_iteration.txt").write_text(str(steps[-1]))
    with open(save / "metrics.jsonl", "w") as file:
        for step in range(1, steps[-1] + 1):
            losses = {"lm_loss": 5 - step / 8, "lm_loss_original": None, "lm_loss_expanded": 5 - step / 8}
            losses |= {"balance_loss": 1 + step / 100, "lpr_loss": 2 - step / 4}
            record = {"iteration": step, "stage": settings["stage"], "consumed_tokens": step * 512 * 1024, **losses}
            file.write(json.dumps(record) + "\n")
    (save / "versions.json").write_text(json.dumps({"torch": "9.9"}))


def card_of(checkpoint: str, **options: object) -> str:
    mcore_to_hf(Path(checkpoint), Path("export"), overwrite=True, **options)
    return (Path("export") / "README.md").read_text()


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def stages_of(card: str) -> list[dict[str, str]]:
    """The table of each stage, with its title."""
    sections = card.split("\n## Training\n")[1].split("\n## Use\n")[0].split("\n### ")[1:]
    return [
        {"title": section.splitlines()[0]} | dict(re.findall(r"^\| ([^|-][^|]*) \| (.*) \|$", section, re.MULTILINE))
        for section in sections
    ]


def test_the_card_describes_each_stage_from_its_records(runs: Path) -> None:
    first, second = stages_of(card_of("stage2"))
    assert first == {
        "title": "Stage 1 (post-pretrain)",
        "trained": "new experts and routers; everything else is frozen",
        "data": "`data/el_text_document` (weight 3), `data/hu_text_document` (weight 1)",
        "steps": "6",
        "tokens": "3,145,728",
        "next-token loss, first to last step": "4.875 to 4.25",
        "… on expanded-language text": "4.875 to 4.25",
        "balance loss, first to last step": "1.01 to 1.06",
        "global batch": "512 sequences of 1,024 tokens",
        "learning rate": "5e-05 to 0, cosine",
        "warm-up": "20 steps",
        "balance loss α": "0.01",
        "optimizer": "adam (betas 0.9, 0.95; eps 1e-08)",
        "weight decay": "0.1",
        "gradient clipping": "1",
        "precision": "bf16",
        "seed": "1234",
        "processes": "8",
        "versions": "torch 9.9",
    }
    assert second["title"] == "Stage 2 (review)"
    assert second["data"] == "`data/review_text_document`"
    assert second["trained"] == "routers; everything else is frozen"
    assert second["LPR loss, first to last step"] == "1.75 to 1"
    assert second["LPR loss γ"] == "0.1 (paper formula)"
    assert not {"balance loss α", "balance loss, first to last step"} & second.keys()


def test_the_card_describes_the_exported_step(runs: Path) -> None:
    (stage,) = stages_of(card_of("stage1", iteration=3))
    assert (stage["steps"], stage["tokens"]) == ("3", "1,572,864")
    assert stage["next-token loss, first to last step"] == "4.875 to 4.625"


def test_the_hub_reads_the_front_matter(runs: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(card_of("stage2", base_model="Qwen/Qwen-tiny"))
    assert card.data.base_model == "Qwen/Qwen-tiny"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license == "other" and card.data.license_name == "tongyi"
    assert card.data.language == ["en", "zh"]
    assert card.data.tags == ["moe", "moe-lpr"]


def test_the_card_of_the_base_is_kept_and_linked(runs: Path) -> None:
    card = card_of("stage2")
    assert (runs / "export" / "README-base.md").read_text() == BASE_CARD
    assert (runs / "Qwen-tiny" / "README.md").read_text() == BASE_CARD
    assert "`Qwen-tiny` ([its own card](README-base.md))" in card
    assert "base_model" not in front_matter(card)  # a folder's name is none of the hub's


def test_unrecorded_details_are_omitted(runs: Path) -> None:
    for folder in (runs / "upcycled" / "hf", runs / "stage1" / "hf"):
        (folder / "origin.json").unlink()
        (folder / "README.md").unlink()
    (runs / "stage1" / "metrics.jsonl").unlink()
    (runs / "stage1" / "versions.json").write_text("{")
    for recipe in (runs / "stage1").rglob("recipe.yaml"):
        recipe.write_text(yaml.safe_dump({"stage": "stage1", "model_source": "upcycled", "lr": None, "bf16": None}))
    card = card_of("stage1")
    assert "None" not in card and "Qwen-tiny" not in card
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    (stage,) = stages_of(card)
    assert set(stage) == {"title", "trained", "steps"}
    bare = card_of("upcycled")
    assert "No training is recorded." in bare
    assert "started as copies" not in bare


def test_text_where_a_number_belongs_is_shown_as_it_is(runs: Path) -> None:
    for recipe in (runs / "stage1").rglob("recipe.yaml"):
        recipe.write_text(yaml.safe_dump(SETTINGS | {"model_source": "upcycled", "lr": "high", "seq_length": [1]}))
    (stage,) = stages_of(card_of("stage1"))
    assert stage["learning rate"] == "high to 0.0, cosine"
    assert stage["global batch"] == "512 sequences of [1] tokens"


def test_metrics_that_end_before_the_step_are_ignored(runs: Path) -> None:
    lines = (runs / "stage1" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs / "stage1" / "metrics.jsonl").write_text("".join(lines[:-1]))
    (stage,) = stages_of(card_of("stage1"))
    assert stage["steps"] == "6" and "tokens" not in stage


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (Start(seed=7), "New experts started as copies (seed 7)."),
        (Start("random"), "New experts started at random (seed 1234)."),
        (Start(noise=0.1), "with noise of 0.1 times the weights' standard deviation (seed"),
        (Start(reinitialise=0.5), "started as copies, 50% of their FFN dimensions reinitialized (seed"),
    ],
)
def test_the_card_describes_how_new_experts_started(runs: Path, start: Start, sentence: str) -> None:
    hf_to_mcore(runs / "Qwen-tiny", Path("again"), num_new_experts=2, start=start)
    assert sentence in card_of("again")


def test_the_card_names_the_adapter_of_new_experts(runs: Path) -> None:
    mcore_to_adapter(Path("upcycled"), Path("adapter"), "Qwen/Qwen-tiny")
    adapter_to_mcore(Path("adapter"), Path("Qwen-tiny"), Path("from-adapter"))
    card = card_of("from-adapter")
    assert "came from the adapter `adapter` of the published MoE-LPR code" in card
    assert front_matter(card)["base_model"] == "Qwen/Qwen-tiny"


def test_a_stage_whose_folder_is_gone_is_named_as_missing(runs: Path) -> None:
    shutil.move("stage1", "elsewhere")
    card = card_of("stage2")
    assert "Earlier training is not recorded: the first stage below started from `stage1`." in card
    assert [stage["title"] for stage in stages_of(card)] == ["Stage 2 (review)"]
    hf_to_mcore(runs / "Qwen-tiny", Path("stage1"), num_new_experts=2)  # another model in its place
    assert read_history(Path("stage2")).missing == "stage1"
    BaseCheckpoint("../elsewhere", "/gone", "iter_0000003", "").write(runs / "stage2")
    assert [stage.step for stage in read_history(Path("stage2")).stages] == [3, 4]


def test_a_resumed_run_is_described_by_its_first_start(runs: Path) -> None:
    write_run("resumed", "stage1", [2, 4], SETTINGS | {"ckpt_step": 3}, resumed=(4,))
    assert [stage.step for stage in read_history(Path("resumed")).stages] == [3, 4]
    shutil.rmtree("resumed/iter_0000002")
    assert read_history(Path("resumed")).missing == "stage1"  # of its two steps it isn't known which
    shutil.rmtree("stage1/iter_0000003")
    assert [stage.step for stage in read_history(Path("resumed")).stages] == [6, 4]


def test_a_run_is_described_by_the_step_that_it_started_from_also_if_there_are_later_ones(runs: Path) -> None:
    write_run("after", "stage1", [4], SETTINGS | {"model_step": "iter_0000003"})
    assert [stage.step for stage in read_history(Path("after")).stages] == [3, 4]
    shutil.rmtree("stage1/iter_0000003")
    assert read_history(Path("after")).missing == "stage1"


def test_a_whole_checkpoint_has_the_history_of_its_run(runs: Path) -> None:
    whole_checkpoint(Path("stage1"), Path("whole"), iteration=3)
    write_run("after", "whole", [5], SETTINGS | {"stage": "stage2"})
    assert [stage["steps"] for stage in stages_of(card_of("after"))] == ["3", "5"]
    assert "`Qwen-tiny`" in card_of("whole") and "(seed 7)" in card_of("whole")
    shutil.rmtree("stage1")
    assert read_history(Path("after")).missing == str(runs / "stage1" / "iter_0000003")


def test_data_listed_in_a_file_is_named_by_that_file(runs: Path) -> None:
    write_run("listed", "upcycled", [2], SETTINGS | {"data_path": None, "data_args_path": "data/blend.txt"})
    assert stages_of(card_of("listed"))[0]["data"] == "the list `data/blend.txt`"


def test_circular_records_are_followed_once(runs: Path) -> None:
    for recipe in Path("stage1").rglob("recipe.yaml"):
        recipe.write_text(yaml.safe_dump(SETTINGS | {"model_source": "stage2"}))
    assert len(read_history(Path("stage2")).stages) == 2


def test_a_run_that_trained_everything_cannot_become_an_adapter(runs: Path) -> None:
    write_run("all", "stage1", [2], SETTINGS | {"train_everything": True})
    write_run("then", "all", [2], SETTINGS)
    assert [stage["trained"] for stage in stages_of(card_of("then"))] == [
        "new experts and routers; everything else is frozen",
        "all parameters",
        "new experts and routers; everything else is frozen",
    ]
    card = card_of("then")
    assert "started as the base's FFN, and everything was trained" in card
    assert "without losing" not in card and "keeps the base's output" not in card
    with pytest.raises(UserError, match="all .*--train-everything"):
        mcore_to_adapter(Path("then"), Path("adapter"), "base")


def test_an_adapter_whose_earlier_training_is_unknown_is_written_with_a_note(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move("stage1", "elsewhere")
    mcore_to_adapter(Path("stage2"), Path("adapter"), "base")
    assert "note: how stage1 was trained is not recorded" in capsys.readouterr().err


def test_parameter_counts_are_those_of_the_loaded_model(runs: Path) -> None:
    from transformers import AutoModelForCausalLM

    card = card_of("stage2")
    table = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", card, re.MULTILINE))
    model = AutoModelForCausalLM.from_pretrained("export")
    zeros = sum(p.numel() for name, p in model.named_parameters() if "shared_expert" in name)
    total = sum(parameter.numel() for parameter in model.parameters()) - zeros
    assert table["parameters"] == f"{total:,}"
    spec = ModelSpec.read(Path("stage2"))
    ffn = 3 * spec.megatron_args["hidden_size"] * spec.megatron_args["ffn_hidden_size"]
    assert table["active parameters per token"] == f"{total - 4 * 2 * ffn:,}"  # 4 layers, 2 of 4 experts not chosen
    assert table["MoE layers"] == "4 of 4 (all)"
    assert table["dtype"] == "float32"


def test_a_dense_model_has_a_card_too(runs: Path) -> None:
    hf_to_mcore(runs / "Qwen-tiny", Path("dense"), num_new_experts=None)
    write_run("tuned", "dense", [2], SETTINGS | {"stage": "dense"})
    card = card_of("tuned")
    assert front_matter(card)["tags"] == ["moe-lpr"] and "experts" not in card
    (stage,) = stages_of(card)
    assert (stage["title"], stage["trained"]) == ("Training of the dense model", "all parameters")


def test_the_code_in_the_card_runs(runs: Path) -> None:
    card = card_of("stage2").replace("path/to/this/folder", str(runs / "export"))
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    scope: dict = {}
    exec(code[1], scope)
    assert type(scope["model"]).__name__ == "Qwen2MoeForCausalLM" and scope["model"].dtype == torch.float32
    assert "vllm serve" in card and "lm_eval --model hf" in card


def test_generation_config_and_safetensors_metadata_are_exported(runs: Path) -> None:
    (runs / "stage2" / "hf" / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    card_of("stage2", max_shard_bytes=40_000)
    assert json.loads((runs / "export" / "generation_config.json").read_text())["temperature"] == 0.7
    shards = list((runs / "export").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert not (runs / "export" / "origin.json").exists()
