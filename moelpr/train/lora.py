"""Train LoRA adapters by peft on the GPUs of this node, on the samples that the stages read, and merge them.

    moelpr train lora --hf-path DIR --data-path PREFIX --train-tokens 100M --save RUN --export HF

RUN gets checkpoints, from which a rerun resumes, metrics.jsonl and the adapter; --export the merged model. A step's
sequences are shared by as many GPUs as --global-batch-size allows.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from moelpr.base import checksums, machine, ranks, stop, yaml_files
from moelpr.base.checksums import FileSum
from moelpr.base.errors import StoppedError, UserError, first_line
from moelpr.base.files import LOCK_FILE, atomic_directory, locked, make_folder, write_text
from moelpr.base.model_code import drop_code
from moelpr.base.quantities import Tokens, format_count
from moelpr.base.run_folder import FINISHED_FILE, METRICS_FILE, RECIPE_FILE, STOP_FILE, read_json, read_settings
from moelpr.base.settings import Count, Flags, Folder, either, metavar, number
from moelpr.base.versions import require_package
from moelpr.data.tokenizers.loading import open_hf_tokenizer
from moelpr.model.families.hf_config import check_model, transformers_config
from moelpr.train.launcher import become, defaults, sharing_gpus, visible_gpus

# They decide neither what is learned nor where it is.
_FREE = ("micro_batch_size", "save_interval", "export", "base_model")
_LENGTH = either("length", required=True)
_PATIENCE_S = 10.0  # ranks of a launcher that was killed end a moment later


class Settings(Flags):
    hf_path: Folder  # the base, a Hugging Face directory
    data_path: Annotated[list[str], metavar("PREFIX")]  # corpus, or weights and corpora in turn, as for the stages
    save: Annotated[Path, metavar("RUN")]  # folder for checkpoints, metrics and the adapter
    export: Annotated[Path, metavar("HF")]  # Hugging Face directory to write
    train_tokens: Annotated[Tokens | None, _LENGTH] = None  # tokens to train on, rounded up
    # passes over all corpora, rounded down to whole steps
    train_epochs: Annotated[float | None, _LENGTH, number(float, 0, below=10**6)] = None
    train_iters: Annotated[Any, _LENGTH, number(int, 1)] = None  # steps to train
    rank: Count = 16  # rank of the adapters
    alpha: int | None = None  # the adapters' scale is alpha / rank (default: twice the rank)
    modules: list[str] = ["all-linear"]  # modules that get an adapter (default: all-linear, all but the output layer)
    global_batch_size: Count = 512  # sequences per step
    micro_batch_size: Count = 8  # sequences at a time
    seq_length: Count = 1024  # tokens per sequence
    lr: float = 2e-4  # highest learning rate
    min_lr: float = 0.0  # last learning rate
    lr_warmup_fraction: float = 0.01  # fraction of the steps in which the learning rate rises
    save_interval: Count = 500  # steps between saves
    seed: int = 1234  # seed of adapters and sample order
    base_model: str | None = None  # name of the base, for the model card (default: that of its folder)


def main(args: Settings) -> None:
    require_package("peft", "lora")
    if args.global_batch_size % args.micro_batch_size:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of --micro-batch-size, got "
            f"{args.micro_batch_size}"
        )
    check_model(args.hf_path, is_hf=True)  # wrong paths are reported before torch is imported
    _blend(args)
    args.train_iters = args.train_iters or _steps(args)
    _start_on_gpus(args)
    stop.end_with_launcher()
    make_folder(args.save)
    is_first, adapter = ranks.is_first_rank(), args.save / "adapter"
    is_finished = (args.save / FINISHED_FILE).is_file()  # for all ranks, before one waits for the lock
    patience_s = _PATIENCE_S if ranks.world_size() > 1 else 0.0
    with locked(args.save / LOCK_FILE, args.save, patience_s) if is_first else nullcontext():
        if is_first:
            _claim(args)
        try:
            if not is_finished:
                train(args, adapter)
        except StoppedError as error:
            if stop.LAUNCHER_VARIABLE not in os.environ:
                raise
            if is_first:
                print(f"moelpr train lora: {error}", file=sys.stderr)
            stop.exit_before_the_last_step()
        if is_first:
            merge(args, adapter)
            write_text(args.save / FINISHED_FILE, f"{args.train_iters}\n")


def _start_on_gpus(args: Settings) -> None:
    """Become torchrun if GPUs can share a step; otherwise use one, since transformers' Trainer takes all it sees."""
    micro_batches = args.global_batch_size // args.micro_batch_size
    if (number := ranks.world_size()) > 1:
        if micro_batches % number:
            raise UserError(f"{number} ranks cannot share the {micro_batches} micro-batches of a step; start fewer")
    elif "WORLD_SIZE" not in os.environ and (number := sharing_gpus(visible_gpus(), micro_batches)) > 1:
        os.environ |= defaults(number) | os.environ
        words = ["--standalone", "--nproc-per-node", str(number), "-m", "moelpr", "train", "lora", *sys.argv[1:]]
        become([sys.executable, "-m", "moelpr.torchrun", *words])
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _steps(args: Settings) -> int:
    """The number of steps of a length in tokens or epochs."""
    from moelpr.data.mixing import num_tokens

    tokens = args.train_tokens or (args.train_epochs or 0) * sum(map(num_tokens, _blend(args)[0]))
    steps = tokens / (args.global_batch_size * args.seq_length)
    if steps < 1:
        raise UserError(
            f"{round(tokens):,} tokens fill no step of {args.global_batch_size:,} sequences of {args.seq_length:,} "
            "tokens; train on more, or lower --global-batch-size"
        )
    return math.ceil(steps) if args.train_tokens else int(steps)


def _blend(args: Settings) -> tuple[list[str], list[float] | None]:
    """Prefixes of corpora and their weights."""
    from moelpr.data.mixing import blend

    prefixes, weights = blend(args.data_path)
    for prefix in prefixes:
        if not Path(f"{prefix}.idx").is_file():
            raise UserError(f"--data-path {prefix} is not a corpus; make one with moelpr data preprocess")
    return prefixes, weights


def _claim(args: Settings) -> None:
    """Record the settings; UserError if the folder was started with others."""
    text = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    now = {"stage": "lora", "lr_decay_style": "cosine", **text}
    before = read_settings(args.save) or now
    if changed := [name for name in now if name not in _FREE and before.get(name) != now[name]]:
        name = changed[0]
        raise UserError(
            f"--save {args.save} was started with {name} {before.get(name)}, not {now[name]}; remove it, or pass "
            "another --save"
        )
    write_text(args.save / RECIPE_FILE, yaml_files.dump(now))


def train(args: Settings, adapter: Path) -> None:
    """Train adapters as the recipes do, from the last checkpoint on; StoppedError if asked to stop, after saving."""
    import torch
    from transformers import Trainer, TrainingArguments

    model, run = _with_adapters(args), args.save
    signals: list[int] = []
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=args.train_iters,
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.global_batch_size // args.micro_batch_size // ranks.world_size(),
        learning_rate=args.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": args.min_lr},
        warmup_steps=math.ceil(args.lr_warmup_fraction * args.train_iters),
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() or ranks.world_size() == 1 else "gloo",
        ddp_find_unused_parameters=False,
        seed=args.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        save_steps=args.save_interval,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=_samples(args, model), callbacks=[_callback(args, signals)])
    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in stop.SIGNALS}
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(run))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if ranks.world_size() > 1:
        trainer.accelerator.end_training()  # ends torch.distributed, which may be another's if there is one rank
    if trainer.state.global_step < args.train_iters:
        if ranks.is_first_rank():
            (run / STOP_FILE).unlink(missing_ok=True)
        raise StoppedError(f"stopped after step {trainer.state.global_step} of {args.train_iters}; rerun to resume")
    if ranks.is_first_rank():
        with atomic_directory(adapter) as temporary:
            model.save_pretrained(str(temporary))


def _with_adapters(args: Settings) -> Any:
    """The base in bf16, which costs a CPU half as much as casting it in every step, with adapters in fp32."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(args.seed)
    modules = args.modules[0] if args.modules == ["all-linear"] else args.modules
    config = LoraConfig(r=args.rank, lora_alpha=_alpha(args), lora_dropout=0.0, target_modules=modules)
    try:
        model = get_peft_model(_base(args, torch.bfloat16), config)
    except ValueError as error:
        raise UserError(f"--modules {' '.join(args.modules)}: {first_line(error)}; name modules of the base") from None
    trained, whole = model.get_nb_trainable_parameters()
    if ranks.is_first_rank():
        print(f"rank {args.rank}, {trained:,} trained parameters of {whole:,}", flush=True)
    return model


def _base(args: Settings, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = transformers_config(args.hf_path)
    options = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    return AutoModelForCausalLM.from_pretrained(args.hf_path, config=config, **options)


def _samples(args: Settings, model: Any) -> Any:
    """The samples that a stage with the same seed reads, in its order.

    One has a token more than its length, because transformers shifts the labels itself.
    """
    from moelpr.model.megatron import cpu

    cpu.install()  # before Megatron is imported; does nothing if there is a GPU
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from moelpr.data.dataset import TaggedGPTDataset, TokenIds, corpus_table

    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=_blend(args),
        split="100,0,0",
        tokenizer=TokenIds(vocab_size=model.config.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    number = args.train_iters * args.global_batch_size
    samples = BlendedMegatronDatasetBuilder(TaggedGPTDataset, [number, 0, 0], lambda: True, config).build()[0]
    corpus_table(samples, number)  # raises a UserError if there are too few

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return number

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            tokens = torch.cat([samples[index]["tokens"], samples[index]["labels"][-1:]])
            return {"input_ids": tokens, "labels": tokens}

    return Samples()


def last_checkpoint(run: Path) -> str | None:
    """The newest complete checkpoint: transformers writes trainer_state.json last, and a full disk makes it damaged."""
    saved = [file.parent for file in run.glob("checkpoint-*/trainer_state.json") if read_json(file)]
    steps = {int(number): folder for folder in saved if (number := folder.name.split("-")[1]).isdecimal()}
    return str(steps[max(steps)]) if steps else None


def _callback(args: Settings, signals: list[int]) -> Any:
    """Writes a line of metrics per step, as the trainer does, and stops the training when it is asked to."""
    import torch
    from transformers import TrainerCallback

    from moelpr.model.metrics import schema as metrics

    tokens = args.global_batch_size * args.seq_length

    class Callback(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.monotonic()

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            if any(ranks.gather(bool(signals or (args.save / STOP_FILE).exists()))):
                control.should_save = control.should_training_stop = True

        def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, float], **___: Any) -> None:
            if "loss" not in logs or not ranks.is_first_rank():
                return
            now = time.monotonic()
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else machine.peak_memory(os.getpid())
            record = {
                "iteration": state.global_step,
                metrics.LM_LOSS: logs["loss"],
                metrics.LEARNING_RATE: logs["learning_rate"],
                metrics.GRAD_NORM: logs["grad_norm"],
                metrics.STEP_TIME_S: now - self.last,
                metrics.TOKENS_PER_S: tokens / (now - self.last),
                metrics.CONSUMED_TOKENS: state.global_step * tokens,
                metrics.PEAK_MEMORY_GIB: peak / 2**30,
            }
            self.last = now
            with open(args.save / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    return Callback()


def merge(args: Settings, adapter: Path) -> None:
    """Write the base, in its own dtype, with the adapter merged into it."""
    from peft import PeftModel

    with atomic_directory(args.export) as temporary:
        PeftModel.from_pretrained(_base(args, "auto"), adapter).merge_and_unload().save_pretrained(temporary)
        open_hf_tokenizer(args.hf_path).save_pretrained(temporary)
        drop_code(temporary)
        write_text(temporary / "README.md", _card(args))
        checksums.write(temporary, {path.name: FileSum.of(path) for path in temporary.glob("*.safetensors")})


def _card(args: Settings) -> str:
    name = args.base_model or args.hf_path.resolve().name
    header = {"library_name": "transformers", "tags": ["lora"]}
    header |= {"base_model": args.base_model} if args.base_model else {}
    tokens = format_count(args.train_iters * args.global_batch_size * args.seq_length)
    settings = f"rank {args.rank}, alpha {_alpha(args)}, {', '.join(args.modules)}, learning rate {args.lr:g}"
    text = f"`{name}`, into which LoRA adapters ({settings}) were merged that were trained on {tokens} tokens."
    return f"---\n{yaml_files.dump(header)}---\n\n# {name} with LoRA\n\n{text}\n"


def _alpha(args: Settings) -> int:
    return int(args.alpha or 2 * args.rank)
