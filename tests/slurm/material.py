"""A tiny untrained model, some text, a stage that trains it, and a comparison of two runs."""

import json
from pathlib import Path

import numpy as np
import torch

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"en": "turn on the light in the kitchen", "el": "άναψε το φως στην κουζίνα", "hu": "kapcsold fel a lámpát"}
MODEL_FLAGS = "--num-new-experts 4 --topk 2".split()
TRAINING_FLAGS = (
    "--micro-batch-size 1 --seq-length 32 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 2 "
    "--log-interval 10 --expert-model-parallel-size 2"
).split()
STEPS = 60  # the length of a stage that is interrupted


def make_model(folder: Path) -> Path:
    """A Qwen2 with random weights and a tokenizer of 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from examples.untrained_qwen2 import save_untrained_qwen2

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    fast.save_pretrained(folder / "tokenizer")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    save_untrained_qwen2(folder / "tokenizer", folder / "hf", **shape)
    return folder / "hf"


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
    from data_tools.corpus.corpus_writer import CorpusWriter

    random = np.random.default_rng(0)
    with CorpusWriter(folder / "corpus", vocab_size=257) as writer:
        for _ in range(60):
            start, length = random.integers(0, 256), random.integers(10, 40)
            writer.add_document((start + np.arange(length, dtype=np.int32)) % 256, is_original=False)
        writer.finalize()
        writer.commit()
    return folder / "corpus"


# The fields of a record that depend on the machine.
MEASURED = ("step_time_s", "tokens_per_s", "peak_memory_gib")


def metrics(run: Path) -> list[dict]:
    """The run's records so far, without fields that depend on the machine."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]


def last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer."""
    from moelpr.checkpoints.chain import step_folder
    from moelpr.checkpoints.torch_dist import TorchDistReader

    reader = TorchDistReader(step_folder(run))
    return {key: reader.read(key) for key in reader.keys}


def differences(one: Path, other: Path) -> list[str]:
    """Differences between the metrics and last checkpoints of two runs; empty if they are bitwise identical."""
    found = []
    one_metrics, other_metrics = metrics(one), metrics(other)
    if one_metrics != other_metrics:
        steps = [a["iteration"] for a, b in zip(one_metrics, other_metrics, strict=False) if a != b]
        found.append(f"metrics of {len(one_metrics)} and {len(other_metrics)} steps, first difference: {steps[:1]}")
    here, there = last_checkpoint(one), last_checkpoint(other)
    if here.keys() != there.keys():
        found.append("the checkpoints contain different tensors")
    return found + [key for key in here.keys() & there.keys() if not torch.equal(here[key], there[key])]


class Stage:
    """Stage 1 of the tiny model on two nodes, slow enough to be interrupted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
        from moelpr.families.new_experts import NewExperts

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
        self.cluster.until(lambda: len(metrics(self.folder / name)) >= step, timeout_s=90)
        return len(metrics(self.folder / name))

    def saved_step(self, name: str) -> int:
        return int((self.folder / name / "latest_checkpointed_iteration.txt").read_text())
