"""The command `moelpr`, which runs every tool: `moelpr SUBCOMMAND …`, or `python -m moelpr SUBCOMMAND …`.

`moelpr --help` lists the subcommands. A tool runs under this name as it does under its own (`python -m MODULE …`).
"""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

from moelpr import __version__
from moelpr.base.command import run_command
from moelpr.base.errors import UserError


class Tool(NamedTuple):
    """A subcommand, whose module has a `main`."""

    module: str
    help: str


# These have one module, which reads the subcommand itself.
PROJECT = "moelpr.project.__main__"
TRAIN = "train"
HELP = ("-h", "--help")
GROUPS: dict[str, dict[str, Tool]] = {
    "From text to model, from one file": {
        "init": Tool(PROJECT, "write a commented languages.yaml for a model and languages"),
        "plan": Tool(PROJECT, "show the steps with time, GPU hours, disk and memory"),
        "run": Tool(PROJECT, "run all steps, or resume them"),
        "status": Tool(PROJECT, "show what is done, and when the rest will be"),
    },
    "Text": {
        "data preprocess": Tool("data_tools.preprocess_data", "tokenize JSON lines or Parquet to a corpus"),
        "data tag": Tool("data_tools.tag_data", "add language bits to a corpus that Megatron's tool wrote"),
        "data merge": Tool("data_tools.merge_data", "join corpora, for example the shards of a job"),
        "data sample": Tool("data_tools.sample_data", "sample documents of corpora, for example for replay"),
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
        "model push": Tool("checkpoint_convert.push", "upload a model to the Hugging Face Hub"),
    },
    "Training": {
        "layouts": Tool("moelpr.plan.__main__", "list the layouts that fit a cluster, with memory and speed"),
        "check": Tool("moelpr.train.check.__main__", "run a stage's command line without a GPU: errors, memory, time"),
        TRAIN: Tool("", "start a stage on this node: stage0, stage1, stage2, sft, dense, ffn or lora"),
    },
    "Results": {
        "evaluate": Tool("moelpr.measure.evaluate.__main__", "measure bits per byte, routing, and benchmarks"),
        "compare": Tool("moelpr.project.compare", "compare finished projects: what they have learned and lost"),
        "chat": Tool("moelpr.measure.chat.__main__", "talk to an export on a local page, and see where tokens go"),
        "report": Tool("moelpr.measure.report.__main__", "make the report of runs, or follow one (report live)"),
        "track": Tool("moelpr.train.track.__main__", "send runs and results to W&B or MLflow"),
    },
}
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


def main() -> None:
    os.environ["PYTHONSAFEPATH"] = "1"  # no process that it starts imports a user's yaml.py or tokenize.py
    run_command(lambda: run(sys.argv[1:]))


def run(words: list[str]) -> None:
    """Run a subcommand with its arguments; its usage and its errors have its name."""
    if words[:1] == ["--version"]:
        print(f"moelpr {__version__}")
        return
    if (groups := asked_for_list(words)) is not None:
        print(usage(groups))
        return
    name, arguments = find(words)
    if name == TRAIN:
        train(arguments)
        return
    module = TOOLS[name].module
    sys.argv = ["moelpr", name, *arguments] if module == PROJECT else [f"moelpr {name}", *arguments]
    importlib.import_module(module).main()


def asked_for_list(words: list[str]) -> list[str] | None:
    """The titles of the groups whose list is asked for: of all, or those of `data` or `model`."""
    first, second = [*words, "--help", "--help"][:2]
    if first in HELP:
        return list(GROUPS)
    titles = [title for title, group in GROUPS.items() if any(name.startswith(f"{first} ") for name in group)]
    return titles if titles and second in HELP else None


def find(words: list[str]) -> tuple[str, list[str]]:
    """The subcommand that `words` start with, of one or two of them, and the words after it.

    Raises:
        UserError: There is no such subcommand.
    """
    for length in (2, 1):
        if (name := " ".join(words[:length])) in TOOLS:
            return name, words[length:]
    is_group = any(name.startswith(f"{words[0]} ") for name in TOOLS)
    given = " ".join(words[: 1 + is_group])
    last = given.split(" ")[-1]
    by_last = dict.fromkeys(STAGES, TRAIN) | {name.split()[-1]: name for name in TOOLS}
    meant = difflib.get_close_matches(last, by_last, n=1)
    hint = f" did you mean {by_last[meant[0]]}?" if meant else ""
    raise UserError(f"there is no subcommand {given};{hint} moelpr --help lists them")


def train(arguments: list[str]) -> None:
    """Start a stage on this node."""
    stage, *arguments = arguments or ["--help"]
    if stage in HELP:
        print("usage: moelpr train STAGE [arguments]; moelpr train STAGE --help lists them\n")
        print(table(STAGES))
        return
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage}; the stages are {', '.join(STAGES)}")
    sys.argv = [f"moelpr train {stage}", *arguments]
    if stage == "lora":  # one process, without Megatron
        return importlib.import_module("moelpr.train.lora").main()
    importlib.import_module("moelpr.train.launcher").launch(stage, arguments)


def usage(groups: Iterable[str]) -> str:
    parts = ["usage: moelpr SUBCOMMAND [arguments]; moelpr SUBCOMMAND --help lists them"]
    parts += [f"{title}:\n" + table({name: tool.help for name, tool in GROUPS[title].items()}) for title in groups]
    return "\n\n".join([*parts, "moelpr --version prints the version."])


def table(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:<23} {text}" for name, text in rows.items())


if __name__ == "__main__":
    main()
