import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from checkpoint_convert.card.front_matter import inherited, plain
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.model.checkpoints.lineage import Lineage, TrainedStage
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec
from tests.unit.checkpoint_convert.conftest import BASE_CARD, SETTINGS, write_run


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
    (stage,) = stages_of(card_of("stage1", iteration=3))  # the exported step, not the latest
    assert (stage["steps"], stage["tokens"]) == ("3", "1,572,864")
    assert stage["next-token loss, first to last step"] == "4.875 to 4.625"
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
    assert (
        second.items()
        >= {
            "title": "Stage 2 (review)",
            "data": "`data/review_text_document`",
            "trained": "routers; everything else is frozen",
            "LPR loss, first to last step": "1.75 to 1",
            "LPR loss γ": "0.1 (paper formula)",
        }.items()
    )
    assert not {"balance loss α", "balance loss, first to last step"} & second.keys()


def test_the_hub_reads_the_front_matter(runs: Path) -> None:
    card: Any = ModelCard(card_of("stage2", base_model="Qwen/Qwen-tiny"))
    names = "base_model library_name pipeline_tag license license_name".split()
    expected = ["Qwen/Qwen-tiny", "transformers", "text-generation", "other", "tongyi"]
    assert [getattr(card.data, name) for name in names] == expected
    assert (card.data.language, card.data.tags) == (["en", "zh"], ["moe", "moe-lpr"])


def test_the_card_of_the_base_is_kept_and_linked(runs: Path) -> None:
    (runs / "stage2" / "hf" / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    card = card_of("stage2")
    assert json.loads((runs / "export" / "generation_config.json").read_text())["temperature"] == 0.7
    assert not (runs / "export" / "origin.json").exists()
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
        recipe.write_text(yaml.safe_dump({"stage": "stage1", "lr": None, "bf16": None}))
    card = card_of("stage1")
    assert "None" not in card and "Qwen-tiny" not in card
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    (stage,) = stages_of(card)
    assert set(stage) == {"title", "trained", "steps"}
    bare = card_of("upcycled")
    assert "No training is recorded." in bare
    assert "started as copies" not in bare


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (Start(seed=7), "New experts started as copies (seed 7)."),
        (Start("random"), "New experts started at random (seed 1234)."),
        (Start(noise=0.1), "with noise of 0.1 times the weights' standard deviation (seed"),
    ],
)
def test_the_card_describes_how_new_experts_started(runs: Path, start: Start, sentence: str) -> None:
    hf_to_mcore(runs / "Qwen-tiny", Path("again"), NewExperts(2), start=start)
    assert sentence in card_of("again")


def test_the_card_of_a_model_that_was_trained_whole_promises_nothing_of_the_base(runs: Path) -> None:
    write_run("all", "stage1", [2], SETTINGS | {"train_everything": True})
    write_run("then", "all", [2], SETTINGS)
    card, experts = card_of("then"), "new experts and routers; everything else is frozen"
    assert [stage["trained"] for stage in stages_of(card)] == [experts, "all parameters", experts]
    assert "started as the base's FFN, and everything was trained" in card
    assert "without losing" not in card and "keeps the base's output" not in card


def test_the_code_in_the_card_runs_and_parameters_are_those_of_the_model_that_it_loads(runs: Path) -> None:
    card, scope = card_of("stage2").replace("path/to/this/folder", str(runs / "export")), {}
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, scope)
    model: Any = scope["model"]
    assert type(model).__name__ == "Qwen2MoeForCausalLM" and model.dtype == torch.float32
    assert "vllm serve" in card and "lm_eval --model hf" in card
    table = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", card, re.MULTILINE))
    total = sum(p.numel() for name, p in model.named_parameters() if "shared_expert" not in name)  # these are zeros
    assert table["parameters"] == f"{total:,}"
    spec = ModelSpec.read(Path("stage2"))
    ffn = 3 * spec.megatron_args["hidden_size"] * spec.megatron_args["ffn_hidden_size"]
    assert table["active parameters per token"] == f"{total - 4 * 2 * ffn:,}"  # 4 layers, 2 of 4 experts not chosen
    assert (table["MoE layers"], table["dtype"]) == ("4 of 4 (all)", "float32")


def test_a_dense_model_has_a_card_too(runs: Path) -> None:
    hf_to_mcore(runs / "Qwen-tiny", Path("dense"), None)
    write_run("tuned", "dense", [2], SETTINGS | {"stage": "dense"})
    card = card_of("tuned")
    assert front_matter(card)["tags"] == ["moe-lpr"] and "experts" not in card
    (stage,) = stages_of(card)
    assert (stage["title"], stage["trained"]) == ("Training of the dense model", "all parameters")


def test_what_a_checkpoint_from_elsewhere_says_is_text_without_paths() -> None:
    settings = {"stage": "stage1", "data_path": ["1", "/lustre/project/el_text"], "optimizer": "a\n# b<script>"}
    stage = TrainedStage(folder="", settings=settings, versions={"torch": "[x](javascript:y)"}, step=1)
    actual = plain(asdict(Lineage(base_model="a|`b`", stages=[stage])))
    (read,) = actual["stages"]
    assert actual["base_model"] == "a b" and "[" not in read["versions"]["torch"]
    assert read["settings"] == {"stage": "stage1", "data_path": ["1", "el_text"], "optimizer": "a # b script"}


def test_a_base_cards_licence_is_no_script(tmp_path: Path) -> None:
    fields = {"language": ["el", "<b>"], "license": "other", "license_link": "javascript:alert(1)"}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(fields)}\n---\n")
    assert inherited(tmp_path, (*fields,)) == {"license": "other"}
