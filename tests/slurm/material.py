"""A tiny untrained model, some text, a stage that trains it, and a comparison of two runs."""

import json
from pathlib import Path

import numpy as np

from benchmarks.common import qwen2_config, save_random_model, write_corpus
from tests.faults.commands import records, tensors
from tests.faults.material import byte_level_tokenizer
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"en": "turn on the light in the kitchen", "el": "άναψε το φως στην κουζίνα", "hu": "kapcsold fel a lámpát"}
TRAINING_FLAGS = (
    "--micro-batch-size 1 --seq-length 32 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 2 "
    "--log-interval 10 --expert-model-parallel-size 2"
).split()
STEPS = 60  # the length of a stage that is interrupted


def make_model(folder: Path) -> Path:
    """A Qwen2 with random weights and a tokenizer of bytes."""
    tokenizer = byte_level_tokenizer(folder)
    model = save_random_model(qwen2_config(2, 32, 48, len(tokenizer), 64), folder / "hf")
    tokenizer.save_pretrained(model)
    return model


def make_text(folder: Path, documents: int = 120) -> dict[str, Path]:
    """Language → a file of documents of different lengths and beginnings."""
    files = {}
    for language, sentence in WORDS.items():
        words = sentence.split()
        files[language] = folder / f"{language}.jsonl"
        with files[language].open("w") as file:
            for number in range(documents):
                text = " ".join(words[(number + index) % len(words)] for index in range(3 + number % 9))
                file.write(json.dumps({"text": text, "lang": language}, ensure_ascii=False) + "\n")
    return files


def make_corpus(folder: Path) -> Path:
    """The prefix of a corpus of expanded-language text, made without a tokenizer."""
    random = np.random.default_rng(0)
    sizes = ((random.integers(0, 256), random.integers(10, 40)) for _ in range(60))
    documents = (((start + np.arange(length)) % 256, False) for start, length in sizes)
    return write_corpus(folder / "corpus", 257, documents)


def differences(one: Path, other: Path) -> list[str]:
    """Differences between the metrics and last checkpoints of two runs; empty if they are bitwise identical."""
    actual = []
    one_records, other_records = records(one), records(other)
    if one_records != other_records:
        steps = [a["iteration"] for a, b in zip(one_records, other_records, strict=False) if a != b]
        actual.append(f"metrics of {len(one_records)} and {len(other_records)} steps, first difference: {steps[:1]}")
    here, there = tensors(one), tensors(other)
    return actual + sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))


class Stage:
    """Stage 1 of the tiny model on two nodes, slow enough to be interrupted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
        from moelpr.model.families.new_experts import NewExperts

        self.cluster, self.folder = cluster, folder
        self.start, self.data = folder / "upcycled", make_corpus(folder)
        hf_to_mcore(make_model(folder), self.start, NewExperts(4, topk=2))

    def submit(self, name: str, *options: object) -> str:
        words = ["--pretrained-checkpoint", self.start, "--data-path", self.data, "--save", self.folder / name]
        words += [*TRAINING_FLAGS, "--train-iters", STEPS, "--global-batch-size", 16, "--save-interval", 25]
        options = ("--nodes", 2, "--job-name", name, "--output", self.folder / f"{name}.log", *options)
        return self.cluster.submit(*options, "launch/slurm/stage.sbatch", "stage1", *words)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until_step(self, name: str, step: int) -> int:
        """Wait until the run has made this step; returns its current step."""
        self.cluster.until(lambda: len(records(self.folder / name)) >= step, timeout_s=90)
        return len(records(self.folder / name))

    def saved_step(self, name: str) -> int:
        return int((self.folder / name / "latest_checkpointed_iteration.txt").read_text())
