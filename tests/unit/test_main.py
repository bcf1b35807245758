"""The command `moelpr`: it knows every tool, runs it under its name, and costs nothing by itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moelpr import __main__ as command

ROOT = Path(__file__).parents[2]


def moelpr(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "moelpr", *arguments]
    return subprocess.run(words, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)


# Prints modules that take long to import.
HELPS = """
import sys
from moelpr.base.settings import parser_of, settings_of
from moelpr.base.tools import COMMANDS
for name, tool in COMMANDS.items():
    if name not in ("train", "check"):
        assert all(action.help for action in parser_of(settings_of(tool.load()))._actions), name
print({"torch", "transformers"} & {*sys.modules})
"""


def test_every_flag_has_a_help_which_is_there_at_once() -> None:
    assert subprocess.check_output([sys.executable, "-c", HELPS], text=True) == "set()\n"


def test_stages_are_those_that_have_a_launcher() -> None:
    launchers = (ROOT / "launch").glob("*.sh")
    assert {*command.STAGES} - {"lora"} == {
        file.stem for file in launchers if f" moelpr train {file.stem} " in file.read_text()
    }


def listed(*group: str) -> list[str]:
    """The subcommands of a help."""
    return re.findall(r"^  (\S+(?: \S+)?)  +\S", moelpr(*group or ["--help"]).stdout, re.MULTILINE)


def test_help_lists_all_and_imports_no_package_that_takes_time() -> None:
    assert listed() == list(command.TOOLS)
    log = moelpr("--help", PYTHONPROFILEIMPORTTIME="1").stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in log.splitlines()}
    assert "moelpr" in imported and not imported & {"numpy", "pydantic", "torch", "transformers", "yaml"}


def test_a_tool_has_the_subcommands_name_in_usage_and_errors() -> None:
    assert moelpr("data", "inspect", "--help").stdout.startswith("usage: moelpr data inspect ")
    assert moelpr("layouts", "--help").stdout.startswith("usage: moelpr layouts ")
    done = moelpr("model", "convert", "--save", "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("moelpr model convert: error: ")


def test_the_file_of_a_tool_runs_too() -> None:
    files = [tool.place.replace(".", "/") + ".py" for tool in command.TOOLS.values() if ":" not in tool.place]
    scripts = [file for file in files if file.startswith(("data_tools/", "checkpoint_convert/"))]
    assert len(scripts) > 10 and all((ROOT / file).read_text().endswith("\n    run_script(main)\n") for file in scripts)
    done = subprocess.run([sys.executable, scripts[0], "--wrong"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "preprocess_data.py: error: " in done.stderr


@pytest.mark.parametrize("group", ["data", "model"])
def test_a_group_lists_its_subcommands(group: str) -> None:
    assert listed(group) == [name for name in command.TOOLS if name.startswith(f"{group} ")]
    assert len({name.split()[0] for name in command.TOOLS}) <= 16


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["preproces"], "data preprocess"),
        (["data", "preproces"], "data preprocess"),
        (["preprocess"], "data preprocess"),
        (["inspect", "--json"], "data inspect"),
        (["data", "convert"], "model convert"),
        (["stage2"], "train"),
        (["train", "stage3"], "stage1"),
        (["--no-flag"], "--help"),
        ([""], "--help"),
    ],
)
def test_an_unknown_name_is_one_sentence_with_the_nearest(words: list[str], named: str) -> None:
    done = moelpr(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert [word for word in words if not word.startswith("--j")][-1] in done.stderr and named in done.stderr


def test_training_becomes_the_launcher_with_this_python_and_its_help() -> None:
    done = moelpr("train", "stage2", "--dry-run", "--lr", "1")
    assert done.stdout.endswith("-m moelpr.pretrain --stage stage2 --lr 1\n")
    assert f" {sys.executable} -m moelpr.torchrun " in done.stdout
    assert all(name in moelpr("train", "--help").stdout for name in command.STAGES)
    assert "--nproc-per-node" in moelpr("train", "stage1", "--help").stdout


NO_WEIGHTS, NO_SPEC = "contains no weights in", "has no model_spec.json"
CHECKPOINT = "is a Megatron checkpoint; export it"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model export --load missing --save x", "there is no folder missing"),
        ("model export --load MODEL --save x", NO_SPEC),
        ("model export --load CHECKPOINT --save x --chat-template-from missing", "no missing/config.json"),
        ("model gguf missing", "no missing/config.json"),
        ("model gguf CHECKPOINT", CHECKPOINT),
        ("model combine missing --expert el=MODEL --text el=TEXT --keep-text OTHER --save z", "no missing/config.json"),
        ("model combine MODEL --expert el=missing --text el=x --keep-text y --save z", "no missing/config.json"),
        ("model combine MODEL --expert el=EMPTY --text el=x --keep-text y --save z", NO_WEIGHTS),
        ("model combine MODEL --expert el=MODEL --text el=missing --keep-text TEXT --save z", "missing"),
        ("model calibrate --model MODEL --base CHECKPOINT --data TEXT --expanded-languages el --save z", CHECKPOINT),
        ("model convert --hf-path missing --num-new-experts 2 --save x", "no missing/config.json"),
        ("model convert --hf-path EMPTY --dense --save x", NO_WEIGHTS),
        ("model convert --hf-path MODEL --dense --save x --extended-tokenizer missing", "there is no folder missing"),
        ("model convert --hf-path MODEL --dense --save x --topk 2", "--dense adds no experts"),
        ("model convert --hf-path MODEL --num-new-experts 2 --save x --expert-noise -1", "noise must be at least"),
        ("model convert --hf-path MODEL --dense --save EMPTY", "EMPTY already exists"),
        ("model graft --base missing --instruct x --model MODEL --save z", "no missing/config.json"),
        ("model graft --base MODEL --instruct MODEL --model CHECKPOINT --save z", CHECKPOINT),
        ("model graft --base MODEL --instruct MODEL --model MODEL --save z --scale -1", "--scale must be above 0"),
        ("model verify MODEL MODEL --text missing", "the input missing can't be read"),
        ("model verify MODEL missing", "no missing/config.json"),
        ("model verify EMPTY MODEL", NO_WEIGHTS),
        ("pack make MODEL EMPTY --text el=TEXT --save x", NO_WEIGHTS),
        ("pack show missing", "missing has no pack.json"),
        ("train ffn --recipe missing", "no recipe missing"),
        ("train stage1 --data-path 1 missing 1 other", "missing.bin or missing.idx is missing"),
        ("chat missing", "no missing/config.json"),
        ("evaluate text --model a=missing --data el=x", "no missing/config.json"),
        ("evaluate text --model a=EMPTY --data el=TEXT", NO_WEIGHTS),
        ("evaluate text --model a=MODEL --data el=missing", "missing"),
        ("evaluate routing --model a=MODEL --data el=TEXT --json-key missing", 'no key "missing"'),
        ("evaluate text --model a=MODEL --data el=TEXT --continuations 1 --language-id missing", "no model missing"),
        ("evaluate harness --model a=CHECKPOINT --languages el --original-languages el", CHECKPOINT),
        ("plan missing", "cannot read missing"),
        ("run missing --made-as 1", "add --task"),
        ("run missing --task convert --on slurm", "remove --on"),
    ],
)
def test_a_wrong_path_or_name_is_an_error_before_torch_is_imported(words: str, message: str, tmp_path: Path) -> None:
    for name in ("MODEL", "EMPTY", "CHECKPOINT"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "MODEL" / "model.safetensors").touch()
    (tmp_path / "CHECKPOINT" / "model_spec.json").write_text("{}")
    for name in ("TEXT", "OTHER"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    code = (
        "import sys; from moelpr.__main__ import run\n"
        "try: run(sys.argv[1:])\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print('torch' in sys.modules)"
    )
    output = subprocess.check_output([sys.executable, "-c", code, *words.split()], text=True, cwd=tmp_path)
    assert output.startswith("UserError") and message in output and output.endswith("\nFalse\n")
