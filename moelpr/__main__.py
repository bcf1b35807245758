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
from moelpr.process.command import run_command
from moelpr.process.errors import UserError
from moelpr.process.program_files import launch_folder


class Tool(NamedTuple):
    """A subcommand, whose module has a `main`."""

    module: str
    help: str


# These have one module, which reads the subcommand itself.
PROJECT = "moelpr.project.__main__"
TRAIN = "train"
GROUPS: dict[str, dict[str, Tool]] = {
    "From text to model, from one file": {
        "init": Tool(PROJECT, "write a commented languages.yaml for a model and languages"),
        "plan": Tool(PROJECT, "show the steps with time, GPU hours, disk and memory"),
        "run": Tool(PROJECT, "run all steps, or resume them"),
        "status": Tool(PROJECT, "show what is done, and when the rest will be"),
    },
    "Text": {
        "clean": Tool("data_tools.clean_text", "remove other languages, near duplicates and evaluation text"),
        "preprocess": Tool("data_tools.preprocess_data", "tokenize JSON lines or Parquet to a corpus"),
        "tag": Tool("data_tools.tag_data", "add language bits to a corpus that Megatron's tool wrote"),
        "merge": Tool("data_tools.merge_data", "join corpora, for example the shards of a job"),
        "sample": Tool("data_tools.sample_data", "sample documents of corpora, for example for replay"),
        "generate": Tool("data_tools.generate_text", "let the base model write text, as replay for those without"),
        "inspect": Tool("data_tools.inspect_data", "show and verify a corpus"),
        "extend-tokenizer": Tool("data_tools.extend_tokenizer", "add tokens for new languages to a tokenizer"),
    },
    "Model": {
        "convert": Tool("checkpoint_convert.hf_to_mcore", "convert a Hugging Face model, and add experts"),
        "export": Tool("checkpoint_convert.mcore_to_hf", "export a checkpoint as a Hugging Face model"),
        "verify": Tool("checkpoint_convert.verify", "compare two models, by tensors and on text"),
        "calibrate": Tool("checkpoint_convert.calibrate", "keep text of other languages with the original expert"),
        "graft": Tool("checkpoint_convert.graft", "add what made the base a chat model"),
        "gguf": Tool("checkpoint_convert.to_gguf", "write an export for llama.cpp, Ollama and LM Studio"),
        "card": Tool("checkpoint_convert.update_card", "add evaluations and metadata to a model card"),
        "push": Tool("checkpoint_convert.push", "upload a model to the Hugging Face Hub"),
        "apply-delta": Tool("checkpoint_convert.apply_delta", "make a model of its base and a delta"),
        "import-adapter": Tool("checkpoint_convert.adapter_to_mcore", "convert an adapter of the published code"),
        "export-adapter": Tool("checkpoint_convert.mcore_to_adapter", "export an adapter for the published code"),
        "whole-checkpoint": Tool("checkpoint_convert.whole_checkpoint", "complete a checkpoint of trained weights"),
    },
    "Training": {
        "layouts": Tool("moelpr.plan.__main__", "list the layouts that fit a cluster, with memory and speed"),
        "check": Tool("moelpr.dry_run.__main__", "run a stage's command line without a GPU: errors, memory, time"),
        TRAIN: Tool("", "start a stage on this node: stage0, stage1, stage2, sft or dense"),
    },
    "Results": {
        "evaluate": Tool("moelpr.evaluate.__main__", "measure bits per byte, routing, and benchmarks"),
        "chat": Tool("moelpr.chat.__main__", "talk to an export on a local page, and see where tokens go"),
        "report": Tool("moelpr.report.__main__", "make the report of runs, or follow one (report live)"),
        "track": Tool("moelpr.metrics.__main__", "send runs and results to W&B, MLflow or trackio"),
    },
}
TOOLS = {name: tool for group in GROUPS.values() for name, tool in group.items()}
STAGES = {
    "stage0": "train only the rows of new tokens",
    "stage1": "post-pretrain: train new experts and routers on expanded-language text",
    "stage2": "review: train the routers on text of all languages",
    "sft": "chat: train new experts and routers on conversations",
    "dense": "train a dense model",
}


def main() -> None:
    run_command(lambda: run(sys.argv[1:]))


def run(words: list[str]) -> None:
    """Run a subcommand with its arguments; its usage and its errors have its name."""
    name, *arguments = words or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"moelpr {__version__}")
    elif (name := find(name)) == TRAIN:
        train(arguments)
    elif name in STAGES:
        train([name, *arguments])
    else:
        module = TOOLS[name].module
        sys.argv = ["moelpr", name, *arguments] if module == PROJECT else [f"moelpr {name}", *arguments]
        importlib.import_module(module).main()


def find(name: str) -> str:
    """The subcommand that is meant: by its name, or by that of its file (`preprocess_data`)."""
    modules = {
        tool.module.removesuffix(".__main__"): own for own, tool in TOOLS.items() if tool.module not in ("", PROJECT)
    }
    known = {module.rpartition(".")[2].replace("_", "-"): own for module, own in modules.items()}
    known |= {own: own for own in [*STAGES, *TOOLS]}
    if (found := known.get(name.replace("_", "-"))) is None:
        raise UserError(f"there is no subcommand {name}{nearest(name, known)} moelpr --help lists them")
    return found


def train(arguments: list[str]) -> None:
    """Become the launcher of a stage, which is to use this Python."""
    stage, *arguments = arguments or ["--help"]
    if stage in ("-h", "--help"):
        print("usage: moelpr train STAGE [arguments]; moelpr train STAGE --help lists them\n")
        print(table(STAGES))
        return
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage}{nearest(stage, STAGES)} the stages are {', '.join(STAGES)}")
    launcher = str(launch_folder() / f"{stage}.sh")
    os.environ["MOELPR_PYTHON"] = sys.executable
    os.execv(launcher, [launcher, *arguments])


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a clause: a semicolon, after it what may be meant."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ";"


def usage() -> str:
    parts = ["usage: moelpr SUBCOMMAND [arguments]; moelpr SUBCOMMAND --help lists them"]
    parts += [f"{title}:\n" + table({name: tool.help for name, tool in of.items()}) for title, of in GROUPS.items()]
    return "\n\n".join([*parts, "moelpr --version prints the version."])


def table(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:<17} {text}" for name, text in rows.items())


if __name__ == "__main__":
    main()
