"""The tiny models that these tests share, and checkpoints, exports and runs of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.command import run_command
from moelpr.base.settings import call
from moelpr.model.checkpoints.lineage import Lineage
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import edit_tensors, make_model, make_qwen2, qwen2, source, write_export  # noqa: F401

BASE_CARD = "---\nlicense: other\nlicense_name: tongyi\nlanguage:\n- en\n- zh\ntags: [chat]\n---\n# The base\n"
# The settings of the first run in `runs`, as its recipe.yaml records them.
SETTINGS = yaml.safe_load("""
{stage: stage1, data_path: ["3", data/el_text_document, "1", data/hu_text_document], global_batch_size: 512,
seq_length: 1024, lr: 5.0e-5, min_lr: 0.0, lr_decay_style: cosine, lr_warmup_iters: 20, balance_loss_coeff: 0.01,
lpr_loss_coeff: 0.0, lpr_loss: paper, optimizer: adam, adam_beta1: 0.9, adam_beta2: 0.95, adam_eps: 1.0e-8,
weight_decay: 0.1, clip_grad: 1.0, bf16: true, fp16: false, seed: 1234, world_size: 8, train_everything: false}
""")


@pytest.fixture
def exit_code() -> Callable[..., int]:
    """Call a command's `main` with arguments, and return the exit code."""

    def run(main: Callable[..., None], *arguments: object) -> int:
        try:
            run_command(lambda: call(main, [*map(str, arguments)]))
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def refused(exit_code: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a command's `main` with arguments that it must refuse, with exit code 2 and one line, which is returned."""

    def run(main: Callable[..., None], *arguments: object) -> str:
        capsys.readouterr()
        assert exit_code(main, *arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}b{% endfor %}"


def instruct_of(base: Path, folder: Path) -> Path:
    """The base after a made post-training: every tensor moves by 2%, and the tokenizer gets another chat template."""
    shutil.copytree(base, folder)
    torch.manual_seed(1)
    for file in sorted(folder.glob("*.safetensors")):
        edit_tensors(file, lambda tensors: [t.mul_(1 + 0.02 * torch.randn_like(t)) for t in tensors.values()])
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture
def base(make_qwen2: Callable[..., Path], tmp_path: Path) -> Path:  # noqa: F811
    """bf16, with a tokenizer and a model card; a test may change it."""
    folder = Path(shutil.copytree(make_qwen2(torch.bfloat16, tokenizer=True), tmp_path / "Base-1B"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe base.\n")
    return folder


@pytest.fixture
def upcycled(qwen2: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A checkpoint of qwen2 with 4 new experts in every layer."""
    hf_to_mcore(qwen2, tmp_path / "checkpoint", NewExperts(4))
    return tmp_path / "checkpoint"


@pytest.fixture
def export(qwen2: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The export of the checkpoint tmp_path/megatron: qwen2 with 4 new experts in layers 0 and 3."""
    return write_export(qwen2, tmp_path, NewExperts(4, moe_layers=[0, 3]))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """JSON lines of letters that the tests' tokenizer has tokens for."""
    lines = ["ab" * 40 + "aaab" * 20, "b" + "a" * 30 + "bbab"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return tmp_path / "text.jsonl"


@pytest.fixture
def runs(make_qwen2: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A base with a card of its own, the upcycled checkpoint, and two stages as the trainer leaves them."""
    base = Path(shutil.copytree(make_qwen2(tokenizer=True), tmp_path / "Qwen-tiny"))
    (base / "README.md").write_text(BASE_CARD)
    monkeypatch.chdir(tmp_path)  # the records name the folders as the user did
    hf_to_mcore(base, Path("upcycled"), NewExperts(3), start=Start(seed=7))
    write_run("stage1", "upcycled", [3, 6], SETTINGS)
    stage2 = {"stage": "stage2", "data_path": ["data/review_text_document"]}
    write_run("stage2", "stage1", [4], SETTINGS | stage2 | {"balance_loss_coeff": 0.0, "lpr_loss_coeff": 0.1})
    return tmp_path


def write_run(name: str, start: str, steps: list[int], settings: dict) -> None:
    """A run of one stage whose weights are those it started from."""
    save, before = Path(name), Path(start)
    save.mkdir()
    shutil.copytree(before / "hf", save / "hf")
    shutil.copyfile(before / "model_spec.json", save / "model_spec.json")
    weights = next(folder for folder in sorted(before.iterdir(), reverse=True) if (folder / ".metadata").is_file())
    Lineage.of(weights).write(save / "hf")
    for step in steps:
        shutil.copytree(weights, save / f"iter_{step:07d}")
        for folder in (save, save / f"iter_{step:07d}"):
            (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    (save / "latest_checkpointed_iteration.txt").write_text(str(steps[-1]))
    with open(save / "metrics.jsonl", "w") as file:
        for step in range(1, steps[-1] + 1):
            losses = {"lm_loss": 5 - step / 8, "lm_loss_original": None, "lm_loss_expanded": 5 - step / 8}
            losses |= {"balance_loss": 1 + step / 100, "lpr_loss": 2 - step / 4}
            record = {"iteration": step, "stage": settings["stage"], "consumed_tokens": step * 512 * 1024, **losses}
            file.write(json.dumps(record) + "\n")
    (save / "versions.json").write_text(json.dumps({"torch": "9.9"}))
