"""The subcommands of `moelpr`: where the function of each is, and its line in --help."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Tool(NamedTuple):
    """A subcommand: MODULE, whose `main` it is, or MODULE:FUNCTION."""

    place: str
    help: str

    def load(self) -> Callable[[Any], None]:
        """The function, which takes its settings (`moelpr.base.settings`)."""
        module, _, name = self.place.partition(":")
        command: Callable[[Any], None] = getattr(importlib.import_module(module), name or "main")
        return command


TRAIN = "train"
GROUPS: dict[str, dict[str, Tool]] = {
    "From text to model, from one file": {
        "init": Tool("moelpr.project.commands:init", "write a commented languages.yaml for a model and languages"),
        "plan": Tool("moelpr.project.commands:plan", "show the steps with time, GPU hours, disk and memory"),
        "run": Tool("moelpr.project.commands:run", "run all steps, or resume them"),
        "status": Tool("moelpr.project.commands:status", "show what is done, and when the rest will be"),
        "demo": Tool("moelpr.project.commands:demo", "run a small project on this CPU, in a few minutes"),
    },
    "Text": {
        "data preprocess": Tool("data_tools.preprocess_data", "tokenize JSON lines or Parquet to a corpus"),
        "data tag": Tool("data_tools.tag_data", "add language bits to a corpus that Megatron's tool wrote"),
        "data merge": Tool("data_tools.merge_data", "join corpora, for example the shards of a job"),
        "data sample": Tool("data_tools.sample_data", "sample documents of corpora, for example for replay"),
        "data kept": Tool("data_tools.kept_text", "fetch a little text in a hundred languages, and code, to keep"),
        "data inspect": Tool("data_tools.inspect_data", "show and verify a corpus"),
        "data extend-tokenizer": Tool("data_tools.extend_tokenizer", "add tokens for new languages to a tokenizer"),
    },
    "Model": {
        "model convert": Tool("checkpoint_convert.convert", "convert a Hugging Face model, and add experts"),
        "model export": Tool("checkpoint_convert.export", "export a checkpoint as a Hugging Face model"),
        "model verify": Tool("checkpoint_convert.verify", "compare two models, by tensors and on text"),
        "model combine": Tool(
            "checkpoint_convert.combine", "a base and FFNs that were trained apart, as one stock MoE"
        ),
        "model calibrate": Tool(
            "checkpoint_convert.calibrate", "keep text of other languages with the original expert"
        ),
        "model graft": Tool("checkpoint_convert.graft", "add what made the base a chat model"),
        "model gguf": Tool("checkpoint_convert.to_gguf", "write an export for llama.cpp, Ollama and LM Studio"),
        "model card": Tool("checkpoint_convert.update_card", "add evaluations and metadata to a model card"),
        "model push": Tool("checkpoint_convert.push", "upload a model or a pack to the Hugging Face Hub"),
    },
    "Packs of languages": {
        "pack make": Tool("checkpoint_convert.pack:make", "pack the FFNs of a model, for others with the same base"),
        "pack keep": Tool("checkpoint_convert.pack:keep", "sum up text to keep, once for a base"),
        "pack build": Tool("checkpoint_convert.pack:build", "make the model of a base and packs, without text"),
        "pack show": Tool("checkpoint_convert.pack:show", "check a pack, and print what it is"),
    },
    "Training": {
        "layouts": Tool("moelpr.plan.commands", "list the layouts that fit a cluster, with memory and speed"),
        "check": Tool("moelpr.train.check.commands", "run a stage's command line without a GPU: errors, memory, time"),
        TRAIN: Tool("", "start a stage on this node: stage0, stage1, stage2, sft, dense, ffn or lora"),
    },
    "Results": {
        "evaluate text": Tool("moelpr.measure.evaluate.commands:text", "measure bits per byte on held-out text"),
        "evaluate routing": Tool("moelpr.measure.evaluate.commands:routing", "show where each language's tokens go"),
        "evaluate harness": Tool("moelpr.measure.evaluate.commands:harness", "run benchmarks by lm-evaluation-harness"),
        "compare": Tool("moelpr.project.compare", "compare finished projects: what they have learned and lost"),
        "chat": Tool("moelpr.measure.chat.commands", "talk to an export on a local page, and see where tokens go"),
        "report": Tool("moelpr.measure.report.commands", "make the report of runs"),
        "track": Tool("moelpr.train.track.commands", "send runs and results to W&B or MLflow"),
    },
}
DEFAULTS = {"evaluate": "evaluate text"}  # the second word may be left out
TOOLS = {name: tool for group in GROUPS.values() for name, tool in group.items()}
STAGES = {
    "stage0": "train only the rows of new tokens",
    "stage1": "post-pretrain: train new experts and routers on expanded-language text",
    "stage2": "review: train the routers on text of all languages",
    "sft": "chat: train new experts and routers on conversations",
    "dense": "train a dense model",
    "ffn": "train the FFNs of a dense model",
    "lora": "train adapters on a dense model by peft, and merge them",
}
# All that are functions: a stage on Megatron is a launcher.
COMMANDS = TOOLS | {"train lora": Tool("moelpr.train.lora", STAGES["lora"])}


def launch_folder() -> Path:
    """The folder of launchers, recipes and Slurm's scripts: of an installed package its own, else the repository's."""
    package = Path(__file__).resolve().parents[1]
    return package / "launch" if (package / "launch").is_dir() else package.parent / "launch"
