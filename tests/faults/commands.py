"""The commands under test, as the cases call them, and how two results are compared.

A case has a folder `box` of its own: the current folder of its commands, with copies of what they read. They write
below `out`.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from moelpr.base.tools import COMMANDS as SUBCOMMANDS
from tests.faults.processes import Ended, Running

_TOKENIZER = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model hf"
_PREPROCESS = (
    "--input {} --language-key lang --original-languages en --output-prefix out/a --append-eod --workers 1 "
) + _TOKENIZER
_TRAIN = (
    "--stage stage1 --recipe recipe.yaml --pretrained-checkpoint checkpoint "
    "--data-path 2 corpus/el_text_document 1 corpus/en_text_document --save out/run"
)
_CORPORA = "corpus/en_text_document corpus/el_text_document"
# Megatron keeps the indices of a corpus's samples next to it.
_CACHES = shutil.ignore_patterns("cache")


@dataclass(frozen=True)
class Command:
    """A command: its name as a subcommand or a module with a `main`, its arguments, and what it reads."""

    name: str
    arguments: str
    reads: str  # files and folders of the material; "a:b" is a, copied to b
    script: str = ""  # the shell script to start instead, with two ranks; such a command can't be forked

    @property
    def words(self) -> list[str]:
        return self.arguments.split()


COMMANDS = {
    "preprocess": Command("data preprocess", _PREPROCESS.format("text/text.jsonl"), "text hf"),
    "preprocess a large file": Command(
        "data preprocess", f"{_PREPROCESS.format('large.jsonl')} --workers 2 --validation-share 0.1", "large.jsonl hf"
    ),
    "preprocess conversations": Command(
        "data preprocess",
        "--input chat.jsonl --conversations --chat-template-from chat.jinja --language-key lang "
        f"--original-languages en --output-prefix out/a --workers 2 --validation-share 0.1 {_TOKENIZER}",
        "chat.jsonl chat.jinja hf",
    ),
    "sentencepiece": Command(
        "data preprocess",
        "--input text/text.jsonl --language expanded --output-prefix out/a --workers 1 --tokenizer-type "
        "SentencePieceTokenizer --tokenizer-model words.model",
        "text words.model",
    ),
    **{
        suffix: Command("data preprocess", _PREPROCESS.format(f"text/text.{suffix}"), "text hf")
        for suffix in ("jsonl.gz", "jsonl.bz2", "jsonl.zst", "parquet")
    },
    **{
        f"corpus of {language}": Command(
            "data preprocess",
            f"--input text/{language}.jsonl --language {group} --output-prefix out/{language} --append-eod --workers 1 "
            + _TOKENIZER,
            "text hf",
        )
        for language, group in (("en", "original"), ("el", "expanded"))
    },
    "merge": Command("data merge", f"--output-prefix out/all --input {_CORPORA}", "corpus"),
    "merge large corpora": Command(
        "data merge", f"--output-prefix out/all --input {' '.join(['large/a_text_document'] * 8)}", "large"
    ),
    "sample": Command(
        "data sample",
        f"--output-prefix out/replay --input {_CORPORA} --original-documents 9 --expanded-documents 9",
        "corpus",
    ),
    "sample a large corpus": Command(
        "data sample",
        "--output-prefix out/replay --input large/a_text_document --original-documents 3000 --expanded-documents 3000",
        "large",
    ),
    "tag": Command(
        "data tag", f"out/el_text_document --language el --bit expanded --overwrite {_TOKENIZER}", "corpus:out hf"
    ),
    "inspect": Command("data inspect", "corpus/en_text_document", "corpus"),
    "extend": Command(
        "data extend-tokenizer",
        "--tokenizer hf --input el=text/el.jsonl --original en=text/en.jsonl --num-new-tokens 5 --held-out-share 0.4 "
        "--save out/tokenizer --workers 1",
        "text hf",
    ),
    "convert": Command(
        "model convert", "--hf-path hf --save out/checkpoint --num-new-experts 4 --topk 2 --original-copies 1", "hf"
    ),
    "new tokens": Command(
        "model convert",
        "--hf-path hf --extended-tokenizer extended --save out/checkpoint --num-new-experts 2",
        "hf extended",
    ),
    "another round": Command("model convert", "--hf-path export --save out/checkpoint --num-new-experts 2", "export"),
    "export": Command("model export", "--load checkpoint --save out/hf --max-shard-size 100KB", "checkpoint"),
    "export a run": Command("model export", "--load stage1 --save out/hf --base-model base", "stage1 checkpoint"),
    "combine": Command(
        "model combine",
        "hf --expert el=expert --text el=text/el.jsonl --keep-text en=text/en.jsonl --max-tokens 200 --save out/hf "
        "--device cpu --unchecked",
        "hf expert text",
    ),
    "pack": Command(
        "pack make", "hf expert --text el=text/el.jsonl --max-tokens 200 --device cpu --save out/pack", "hf expert text"
    ),
    "kept sums": Command(
        "pack keep", "hf --text en=text/en.jsonl --max-tokens 200 --device cpu --save out/kept", "hf text"
    ),
    "build of packs": Command("pack build", "hf pack --kept kept --save out/hf", "hf pack kept"),
    "settings": Command("tests.faults.settings", _TRAIN, "recipe.yaml checkpoint corpus"),
    "train on two ranks": Command(
        "",
        f"{_TRAIN.removeprefix('--stage stage1')} --train-iters 6 --save-interval 2 --expert-model-parallel-size 2 "
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
        "recipe.yaml checkpoint corpus",
        "launch/stage1.sh",
    ),
    "train": Command("moelpr.pretrain", _TRAIN, "recipe.yaml checkpoint corpus"),
    "resume": Command("moelpr.pretrain", _TRAIN, "recipe.yaml checkpoint corpus half:out/run"),
    "evaluate": Command("evaluate text", "--model base=hf --data en=text/en.jsonl --data el=text/el.jsonl", "hf text"),
    "evaluate an export": Command(
        "evaluate routing",
        "--model x=export --data en=text/en.jsonl --data el=text/el.jsonl --original-languages en",
        "export text",
    ),
    "evaluate a checkpoint": Command(
        "evaluate text", "--model x=stage1 --data en=text/en.jsonl", "stage1 checkpoint text"
    ),
    "evaluate again": Command(
        "evaluate text",
        "--model base=hf --data en=text/en.jsonl --data el=text/el.jsonl --output out/evaluation",
        "hf text evaluation:out/evaluation",
    ),
    "compare": Command(
        "compare",
        "project.yaml --data more=text/text.jsonl --output out/comparison",
        "project.yaml hf text export:project/hf",
    ),
    "report": Command("report", "stage1 --output out/report", "stage1"),
    "scripts": Command("tests.faults.scripts", "project.yaml", "project.yaml"),
    "finished": Command("run", "finished.yaml --dry-run", "finished.yaml hf text finished:project"),
    "push": Command("model push", "export owner/name --dry-run", "export"),
    "plan": Command(
        "layouts",
        "--hf-path hf --num-new-experts 3 --gpus 8 --gpu-memory-gib 80 --seq-length 64",
        "hf/config.json:hf/config.json",
    ),
}


def fill(box: Path, command: Command, material: Path) -> None:
    """Copy what a command reads into a new box. Times are kept: caches and resumed jobs compare them."""
    (box / "out").mkdir(parents=True)
    for item in command.reads.split():
        source, _, target = item.partition(":")
        path = box / (target or source)
        if (material / source).is_dir():
            shutil.copytree(material / source, path, symlinks=True, ignore=_CACHES, dirs_exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(material / source, path)


def start(command: Command, box: Path, words: list[str] | None = None, name: str = "") -> Running:
    """Fork this process, which has imported everything, into the command."""
    words = command.words if words is None else words
    if command.script:
        return launch(command, box, words)
    return Running.forked(command.name, words, box, name, _variables(command))


def launch(command: Command, box: Path, words: list[str]) -> Running:
    """Start the command as a user does."""
    if command.script:
        return Running.launched([ROOT / command.script, *words], box, NPROC_PER_NODE="2")
    start = ["moelpr", *command.name.split()] if command.name in SUBCOMMANDS else [command.name]
    return Running.launched([sys.executable, "-m", *start, *words], box, **_variables(command))


def run(command: Command, box: Path, words: list[str] | None = None) -> Ended:
    return start(command, box, words).wait()


def _variables(command: Command) -> dict[str, str]:
    """torchrun's variables for a single rank, if the command trains, without a port: such a rank opens none."""
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} if command.arguments == _TRAIN else {}


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of each file; "" for a folder. A lock may stay."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def same_files(box: Path, other: Path) -> bool:
    """All outputs are equal."""
    return digests(box / "out") == digests(other / "out")


def same_corpus(box: Path, other: Path) -> bool:
    """Tokens and language bits are equal; a manifest copies texts of its inputs' manifests."""

    def corpus(folder: Path) -> dict[str, str]:
        return {name: digest for name, digest in digests(folder / "out").items() if not name.endswith(".json")}

    return corpus(box) == corpus(other)


def same_tensors(box: Path, other: Path) -> bool:
    """The weights are equal; settings and tokenizer are copied from the input, which has no checksum of them."""
    return tensors(box / "out") == tensors(other / "out")


def same_run(box: Path, other: Path) -> bool:
    """The last step's tensors and all metrics, except times and memory."""
    return tensors(box / "out") == tensors(other / "out") and records(box / "out/run") == records(other / "out/run")


def same_print(box: Path, other: Path) -> bool:
    """The commands have printed the same."""
    return box.with_name("stdout").read_bytes() == other.with_name("stdout").read_bytes()


def same_settings(box: Path, other: Path) -> bool:
    """All flags with their final values."""
    return (box / "out/settings.yaml").read_bytes() == (other / "out/settings.yaml").read_bytes()


def anything(box: Path, other: Path) -> bool:
    """The input has no right result, or none that could be known."""
    return True


def tensors(folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> dtype and digest, of all exports and of the last step of each checkpoint."""
    from safetensors.torch import load_file

    from moelpr.base.run_folder import TRACKER_FILE
    from moelpr.model.checkpoints.chain import step_folder
    from moelpr.model.checkpoints.torch_dist import TorchDistReader

    actual: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        actual |= load_file(file)
    for tracker in sorted(folder.rglob(TRACKER_FILE)):
        reader = TorchDistReader(step_folder(tracker.parent))
        actual |= {key: reader.read(key) for key in reader.keys}
    return {name: (str(value.dtype), _digest(value)) for name, value in actual.items()}


def _digest(tensor: Any) -> str:
    import torch

    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return f"{tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def records(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl so far, without what is measured."""
    measured = {
        "step_time_s",
        "tokens_per_s",
        "peak_memory_gib",
        *(f"forward_time_s_{of}" for of in ("min", "mean", "max")),
    }
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    actual = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in record.items() if key not in measured} for record in actual]


Judge = Callable[[Path, Path], bool]
