"""LoRA by peft, on the samples of a corpus in the trainer's order: what most people would do instead.

python -m examples.real_model.lora --base DIR --data-path PREFIX --run DIR --save DIR --train-iters 160 --lr 1e-3

Adapters on all linear layers but the output layer, with alpha = 2 rank. The default rank is the smallest dimension of
these layers, beyond which a higher one adds nothing to the smallest of them. --only-ffn trains all weights of the FFNs
instead, and nothing else: what MoE-LPR trains, without experts. --run gets checkpoints, from which a rerun
continues, metrics.jsonl and the adapter; --save the base with the adapter merged into it, as a Hugging Face directory.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch.utils.data import Dataset

from examples.real_model.settings import BATCH, BETA2, MICRO_BATCH, SEQUENCE_LENGTH, minimum_rate, warmup_steps
from moelpr.base import machine
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, locked, make_folder, write_text
from moelpr.base.records import STRICT, Record
from moelpr.base.run_folder import read_json
from moelpr.data.manifest import Manifest
from moelpr.model.metrics import schema as metrics

SAVE_INTERVAL = 40  # steps


@dataclass(frozen=True, config=STRICT)
class LoraSettings(Record):
    """The settings that a LoRA training was started with, in its folder.

    Attributes:
        train_iters: Number of optimizer steps.
        lr: Learning rate.
        rank: Rank of the adapters; null for the smallest dimension of a layer.
        seed: Random seed.
        only_ffn: Whether the FFNs are trained instead.
    """

    FILE_NAME: ClassVar[str] = "settings.json"
    REMEDY: ClassVar[str] = "remove the folder, or pass another --run"

    train_iters: int
    lr: float
    rank: int | None
    seed: int
    only_ffn: bool = False

    def claim(self, run: Path) -> None:
        """Record the settings; a folder belongs to one training.

        Raises:
            UserError: The folder was started with other settings.
        """
        before = self.read_if_there(run) or self
        old, new = before.as_json(), self.as_json()
        if changed := [name for name in new if old[name] != new[name]]:
            found, wanted = (", ".join(f"{name} {values[name]}" for name in changed) for values in (old, new))
            raise UserError(f"--run {run} was started with {found}, not with {wanted}; {self.REMEDY}")
        self.write(run)


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", type=Path, required=True, metavar="DIR", help="Hugging Face directory")
    corpora = "corpus, or weights and corpora in turn, as of the trainer"
    add("--data-path", nargs="+", required=True, metavar="PREFIX", help=corpora)
    add("--run", type=Path, required=True, metavar="DIR", help="folder for checkpoints, metrics and the adapter")
    add("--save", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    add("--train-iters", type=int, required=True, metavar="N", help="optimizer steps")
    add("--lr", type=float, required=True, metavar="RATE", help="learning rate")
    trained = parser.add_mutually_exclusive_group().add_argument
    trained("--rank", type=int, metavar="R", help="rank of the adapters (default: the smallest dimension of a layer)")
    trained("--only-ffn", action="store_true", help="train the FFNs themselves instead of adapters")
    add("--seed", type=int, default=1, metavar="N", help="of the adapters and of the order (default: %(default)s)")
    args = parser.parse_args()
    is_blend = len(args.data_path) > 1
    prefixes = args.data_path[1::2] if is_blend else args.data_path
    weights = [float(weight) for weight in args.data_path[::2]] if is_blend else None
    for prefix in prefixes:
        if Manifest.read(prefix) is None:
            raise UserError(f"--data-path {prefix} is not a corpus; make one with data_tools/preprocess_data.py")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("peft is not installed; run examples/real_model/install.sh") from error
    LoraSettings(args.train_iters, args.lr, args.rank, args.seed, args.only_ffn).claim(args.run)
    # With several GPUs, transformers' Trainer would multiply the batch.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with locked(args.run / ".lock", args.run):  # a killed queue may have left the one before running
        model = only_ffns(args.base) if args.only_ffn else add_adapters(args.base, args.rank, args.seed)
        blend = prefixes, weights
        samples = PackedSamples(blend, args.train_iters * BATCH, args.seed, model.config.vocab_size)
        train(model, samples, args.run, args.train_iters, args.lr, args.seed)
        if args.only_ffn:
            save_whole(model, args.base, args.save)
        else:
            model.save_pretrained(args.run / "adapter")
            save_merged(args.base, args.run / "adapter", args.save)


class PackedSamples(Dataset):
    """The trainer's samples of a corpus, in its order: those that stage 1 with the same seed reads.

    A sample has a token more than its length, because transformers shifts the labels itself.
    """

    def __init__(self, blend: tuple[list[str], list[float] | None], number: int, seed: int, vocab_size: int) -> None:
        from moelpr.model.megatron import cpu

        cpu.install()  # before Megatron is imported; does nothing if there is a GPU
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        from moelpr.data.dataset import TaggedGPTDataset, TokenIds

        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=SEQUENCE_LENGTH,
            blend=blend,
            split="100,0,0",
            tokenizer=TokenIds(vocab_size=vocab_size),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        self.number = number
        self._samples, *_ = BlendedMegatronDatasetBuilder(
            TaggedGPTDataset, [number, 0, 0], lambda: True, config
        ).build()

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self._samples[index]
        tokens = torch.cat([sample["tokens"], sample["labels"][-1:]])
        return {"input_ids": tokens, "labels": tokens}


def add_adapters(base: Path, rank: int | None, seed: int) -> Any:
    """The base in bf16, which costs a CPU half as much as casting it in every step, with adapters in fp32.

    Prints their rank and number of parameters.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
    )
    output = model.get_output_embeddings()
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not output]
    rank = rank or min(min(part.in_features, part.out_features) for part in linear)
    torch.manual_seed(seed)
    whole = model.num_parameters()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    print(f"rank {rank}, {adapted.get_nb_trainable_parameters()[0]:,} trained parameters of {whole:,}", flush=True)
    return adapted


def only_ffns(base: Path) -> Any:
    """The base in bf16, but its FFNs in fp32, which alone are trained. Prints their number of parameters."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
    ).requires_grad_(False)
    for layer in model.get_decoder().layers:
        layer.mlp.float().requires_grad_(True)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(f"FFNs, {trained:,} trained parameters of {model.num_parameters():,}", flush=True)
    return model


def train(model: Any, samples: PackedSamples, run: Path, steps: int, rate: float, seed: int) -> None:
    """Train `model` in place, with the trainer's optimizer and schedule, in bf16; continues from a checkpoint."""
    from transformers import Trainer, TrainingArguments

    make_folder(run)
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH,
        learning_rate=rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": minimum_rate(rate)},
        warmup_steps=warmup_steps(steps),
        weight_decay=0.0,
        adam_beta2=BETA2,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        save_steps=SAVE_INTERVAL,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[_metrics_writer(run / "metrics.jsonl")])
    trainer.train(resume_from_checkpoint=last_checkpoint(run))
    write_text(run / "FINISHED", f"{steps}\n")


def last_checkpoint(run: Path) -> str | None:
    """The newest complete checkpoint: transformers writes trainer_state.json last, and a full disk makes it damaged."""
    saved = [file.parent for file in run.glob("checkpoint-*/trainer_state.json") if read_json(file)]
    steps = {int(number): folder for folder in saved if (number := folder.name.split("-")[1]).isdecimal()}
    return str(steps[max(steps)]) if steps else None


def save_whole(model: Any, base: Path, save: Path) -> None:
    """Write the base, in its own dtype, with the weights of `model` that were trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    whole = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True, trust_remote_code=False)
    whole.load_state_dict({name: weight.detach() for name, weight in trained.items()}, strict=False)
    with atomic_directory(save) as temporary:
        whole.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False).save_pretrained(temporary)


def save_merged(base: Path, adapter: Path, save: Path) -> None:
    """Write the base, in its own dtype, with the adapter merged into it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True, trust_remote_code=False)
    with atomic_directory(save) as temporary:
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(temporary)
        AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False).save_pretrained(temporary)


def _metrics_writer(path: Path) -> Any:
    """A callback that writes a line per step, as the trainer does."""
    from transformers import TrainerCallback

    class Writer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.monotonic()

        def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, float], **___: Any) -> None:
            if "loss" not in logs:
                return
            now = time.monotonic()
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else machine.peak_memory(os.getpid())
            record = {
                "iteration": state.global_step,
                metrics.LM_LOSS: logs["loss"],
                metrics.LEARNING_RATE: logs["learning_rate"],
                metrics.GRAD_NORM: logs["grad_norm"],
                metrics.STEP_TIME_S: now - self.last,
                metrics.CONSUMED_TOKENS: state.global_step * BATCH * SEQUENCE_LENGTH,
                metrics.PEAK_MEMORY_GIB: peak / 2**30,
            }
            self.last = now
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    return Writer()


if __name__ == "__main__":
    run_command(main)
