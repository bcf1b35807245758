"""`moelpr train STAGE` and launch/STAGE.sh: the command and variables they start with, and what they reject."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moelpr.base.errors import UserError
from moelpr.base.run_folder import TRACKER_FILE
from moelpr.train import launcher
from moelpr.train.arguments.early import check_start
from tests.support.programs import write_program

ROOT = Path(__file__).parents[2]
OPTIONS = "NPROC_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT JOIN_TIMEOUT".split()
SET_HERE = (*OPTIONS, "CUDA_VISIBLE_DEVICES", "JOB_COMPLETION_INDEX", "MOELPR_PYTHON")
DEFAULTS = ("PYTHONWARNINGS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTHONPATH", "PYTORCH_CUDA_ALLOC_CONF")


def pairs(variables: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in variables.split())


def started(*words: str, **variables: str) -> tuple[dict[str, str], list[str], list[str]]:
    """The variables of torchrun, its arguments and the trainer's arguments."""
    removed = re.compile("|".join((*SET_HERE, *DEFAULTS, "PET_.*", "SLURM_.*")))
    environment = {name: value for name, value in os.environ.items() if not removed.fullmatch(name)} | variables
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("os.environ", environment)
        patch.setattr(launcher, "become", sys.exit)
        patch.setattr("moelpr.train.arguments.early.check_start", lambda *_: None)
        launcher.launch("stage1", words)
    command = end.value.code
    assert isinstance(command, list) and command[:3] == [sys.executable, "-m", "moelpr.torchrun"]
    trainer = command.index("moelpr.pretrain")
    return environment, command[3 : trainer - 1], command[trainer + 1 :]


@pytest.mark.parametrize(("visible", "processes"), [("4,5,7", 3), ("", 1), ("-1", 1), ("NoDevFiles", 1)])
def test_one_node_uses_every_gpu_or_one_process_and_a_free_port(visible: str, processes: int) -> None:
    _, torchrun, trainer = started("--lr", "1", CUDA_VISIBLE_DEVICES=visible)
    assert torchrun == ["--standalone", "--nnodes", "1", "--nproc-per-node", str(processes)]
    assert trainer == ["--stage", "stage1", "--lr", "1"]


def test_options_and_variables_are_equivalent() -> None:
    options = "--nnodes 2 --node_rank=1 --master-addr node-a --master_port 4321 --nproc-per-node=3 --lr 1"
    variables = "NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a MASTER_PORT=4321 NPROC_PER_NODE=3"
    by_options, by_variables = started(*options.split()), started("--lr", "1", **pairs(variables))
    assert by_options[1:] == by_variables[1:] and by_options[1] == ON_NODE_1.split()


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [
        ("--nproc-per-node 2", "--nproc-per-node 2"),  # overrides the variable
        ("--master-port 4321", "--master-port 4321 --nproc-per-node 5"),
        ("--nnodes 2 --node-rank 0 --master-addr a --join-timeout 300", "--rdzv-conf timeout=300 --nproc-per-node 5"),
    ],
)
def test_an_option_reaches_torchrun(arguments: str, ending: str) -> None:
    assert shlex.join(started(*arguments.split(), NPROC_PER_NODE="5")[1]).endswith(ending)


KUBEFLOW = "PET_NNODES=2 PET_NODE_RANK=1 PET_NPROC_PER_NODE=3 PET_MASTER_ADDR=node-a PET_MASTER_PORT=4321"
ON_NODE_1 = "--nnodes 2 --node-rank 1 --master-addr node-a --master-port 4321 --nproc-per-node 3"
SRUN = "SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=1 SLURM_STEP_NODELIST=node-[a-b] SLURM_JOB_ID=24321"


@pytest.mark.parametrize(
    ("variables", "changes"),
    [
        (KUBEFLOW, {}),
        (KUBEFLOW.replace("=2 ", "=2:2 "), {}),
        (KUBEFLOW.replace("PET_NODE_RANK", "JOB_COMPLETION_INDEX"), {}),
        (f"{KUBEFLOW} JOB_COMPLETION_INDEX=0 {SRUN}", {}),  # the first of them
        (KUBEFLOW.replace("PET_MASTER", "MASTER"), {}),
        (f"{KUBEFLOW} NODE_RANK=0 MASTER_ADDR=node-b", {"--node-rank 1": "--node-rank 0", "node-a": "node-b"}),
        (f"{KUBEFLOW} NPROC_PER_NODE=gpu", {"node 3": "node 2"}),
        (KUBEFLOW.replace("PER_NODE=3", "PER_NODE=auto"), {"node 3": "node 2"}),
        (f"{SRUN} PET_NPROC_PER_NODE=3", {"4321": "24321"}),
        (f"{SRUN} NPROC_PER_NODE=3 MASTER_PORT=4321 MASTER_ADDR=node-b", {"node-a": "node-b"}),
        # One node stays one, also for torchrun, which reads PET_NNODES too.
        ("JOB_COMPLETION_INDEX=3", None),  # jobs of their own
        ("SLURM_NNODES=2 SLURM_JOB_NODELIST=node-[a-b] SLURM_NODEID=0", None),  # a batch script, or salloc
        ("SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=1 SLURM_NODEID=0", None),
        ("PET_NNODES=2 NNODES=1", None),
    ],
)
def test_a_pod_and_a_task_of_srun_know_their_node(tmp_path: Path, variables: str, changes: dict | None) -> None:
    """torchrun's own variables, a Job's and Slurm's; the more specific ones first."""
    write_program(tmp_path / "scontrol", '[ "$*" = "show hostnames node-[a-b]" ] && printf "node-a\\nnode-b\\n"')
    path, expected = f"{tmp_path}:{os.environ['PATH']}", ON_NODE_1
    for before, after in (changes or {}).items():
        expected = expected.replace(before, after)
    if changes is None:
        expected = "--standalone --nnodes 1 --nproc-per-node 2"
    assert shlex.join(started(CUDA_VISIBLE_DEVICES="0,1", PATH=path, **pairs(variables))[1]) == expected


def test_several_tasks_of_srun_on_a_node_and_an_elastic_job_are_refused() -> None:
    with pytest.raises(UserError, match="--ntasks-per-node 1"):
        started(**pairs(SRUN.replace("TASKS=2", "TASKS=16")))
    with pytest.raises(UserError, match="--nnodes .*1:4"):
        started(PET_NNODES="1:4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "no/such"], "there is no recipe no/such"),
        (
            ["--recipe", "paper-stage1", "--train-iters", "1", "--data-path", "x"],
            "(?s)a checkpoint is required.* x.bin or",
        ),
        (["--recipe", "paper-stage1", "--lr", "abc", "--bogus", "3"], r"--lr must be at least 0, got abc"),
        (["--pretrained-checkpoint", "no/such"], "--pretrained-checkpoint no/such is not a Megatron checkpoint"),
        ([], r"(?s)^6 settings are wrong:.*--lr is required.*--data-path is required"),
    ],
)
def test_what_is_missing_is_an_error_before_torchrun_starts(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launcher.launch("stage1", words)


@pytest.mark.parametrize("place", ["--save {}", "--save={}", "--load {} --save new"])
def test_a_run_is_resumed_by_the_same_command_when_its_start_was_deleted(tmp_path: Path, place: str) -> None:
    words = ["--pretrained-checkpoint", "no/such", *place.format(tmp_path).split()]
    for suffix in ("bin", "idx"):
        (tmp_path / f"x.{suffix}").touch()
    words += f"--recipe paper-stage1 --train-iters 1 --data-path {tmp_path}/x".split()
    with pytest.raises(UserError, match="^--pretrained-checkpoint no/such is not a Megatron checkpoint"):
        check_start("stage1", words)
    (tmp_path / TRACKER_FILE).write_text("2")
    check_start("stage1", words)


def test_a_dry_run_prints_the_command_at_any_position(tmp_path: Path, capsys, monkeypatch) -> None:
    python = write_program(tmp_path / "a python", 'env; printf "%s\\n" "$@"')
    monkeypatch.setattr("sys.executable", str(python))
    words = ["--save", "my run", "--data-path", "0.3", "a$b", "1", "c'd", "--nproc-per-node", "2"]
    variables, torchrun, trainer = started(*words, PYTHONPATH="/a b", PATH=os.environ["PATH"])
    monkeypatch.setattr("os.environ", {"PYTHONPATH": "/a b", "PATH": os.environ["PATH"]})
    launcher.launch("stage1", ["--dry-run", *words])
    launcher.launch("stage1", [*words, "--dry-run"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    lines = subprocess.check_output(["bash", "-c", first], env={"PATH": os.environ["PATH"]}, text=True).splitlines()
    end = ["-m", "moelpr.torchrun", *torchrun, "-m", "moelpr.pretrain", *trainer]
    assert lines[-len(end) :] == end
    assert {f"{name}={variables[name]}" for name in DEFAULTS if name in variables} <= {*lines}


@pytest.mark.parametrize("is_found", [True, False])
def test_a_script_takes_the_pythons_of_a_variable_and_of_the_repository_or_python3(tmp_path: Path, is_found) -> None:
    """The last finds the repository on its path."""
    shutil.copytree(ROOT / "launch", tmp_path / "a root/launch")
    show = 'echo "$0 $PYTHONPATH"; printf "%s\\n" "$@"'
    python3 = write_program(tmp_path / "bin/python3", show)
    environment = {"PATH": f"{python3.parent}:{os.environ['PATH']}", "PYTHONPATH": "/mine"}
    expected = f"{python3} {tmp_path}/a root:/mine"
    for place in (".venv/bin/python", "own/python") if is_found else ():
        python = write_program(tmp_path / "a root" / place, show)
        environment |= {"MOELPR_PYTHON": str(python)} if place.startswith("own") else {}
        expected = f"{python} /mine"
    command = [tmp_path / "a root/launch/stage1.sh", "--data-path", "a b"]
    shown = subprocess.check_output(command, env=environment, text=True, timeout=20).splitlines()
    assert shown == [expected, *"-P -m moelpr train stage1 --data-path".split(), "a b"]


def test_nccl_is_configured_with_gpus_and_the_allocator_without() -> None:
    """Variables that are set are kept."""
    on_gpu, _, _ = started(CUDA_VISIBLE_DEVICES="0", NCCL_DEBUG="INFO", PYTHONWARNINGS="default")
    on_cpu, _, _ = started(CUDA_VISIBLE_DEVICES="", CUDA_DEVICE_MAX_CONNECTIONS="32")
    both = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "default", "NCCL_DEBUG": "INFO"}
    torch = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    assert on_gpu.items() >= (both | torch | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}).items()
    assert not any(name.startswith("MALLOC") for name in on_gpu)
    assert on_cpu.items() >= {"MALLOC_TRIM_THRESHOLD_": str(16 * 2**30), "MALLOC_MMAP_MAX_": "0"}.items()
    assert on_cpu["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert not {*torch, "PYTORCH_CUDA_ALLOC_CONF"} & on_cpu.keys()
    assert Path(on_gpu["TRITON_CACHE_DIR"]).is_relative_to(tempfile.gettempdir())
    kept, _, _ = started(CUDA_VISIBLE_DEVICES="0", PYTORCH_ALLOC_CONF="max_split_size_mb:512")
    assert kept["NCCL_DEBUG"] == "WARN" and "PYTORCH_CUDA_ALLOC_CONF" not in kept


@pytest.mark.parametrize(
    ("arguments", "option", "found"),
    [
        ("--nnodes two", "--nnodes", "got two"),
        ("--nproc-per-node 0", "--nproc-per-node", "got 0"),
        ("--nnodes 2", "--node-rank", "0 to 1"),
        ("--nnodes 2 --node-rank 2", "--node-rank", "0 to 1, got 2"),
        ("--nnodes 2 --node-rank 0", "--master-addr", "node 0"),
        ("--master-addr --lr 1", "--master-addr", "pass --master-addr VALUE"),
        ("--nnodes", "--nnodes", "pass --nnodes VALUE"),
    ],
)
def test_a_wrong_option_is_named_with_the_values_that_work(arguments: str, option: str, found: str) -> None:
    with pytest.raises(UserError, match=f"{option}.*{found}"):
        started(*arguments.split())


def test_no_flag_of_the_trainer_is_an_option_of_the_launcher() -> None:
    from moelpr.train.arguments.flags import all_arguments

    taken = {"dry_run", *map(str.lower, OPTIONS)}
    assert not taken & {flag.removeprefix("--").replace("-", "_") for flag in all_arguments().flags()}


def test_help_lists_every_option_with_its_variable_and_then_shows_the_trainers(monkeypatch, capsys) -> None:
    monkeypatch.setattr(launcher, "become", sys.exit)
    with pytest.raises(SystemExit) as end:
        launcher.launch("stage1", ["--lr", "1", "--help"])
    assert end.value.code == [sys.executable, "-m", "moelpr.pretrain", "--help"]
    names = {f"--{name.lower().replace('_', '-')}": name for name in OPTIONS}
    assert dict(re.findall(r"^  (--[\w-]+) +([A-Z_]+) ", capsys.readouterr().out, re.MULTILINE)) == names
