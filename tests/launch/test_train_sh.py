"""launch/stage1.sh and its siblings: the command and variables they start with, and what they reject."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = "NPROC_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT JOIN_TIMEOUT".split()
SET_HERE = (*OPTIONS, "CUDA_VISIBLE_DEVICES", "JOB_COMPLETION_INDEX")
DEFAULTS = ("PYTHONWARNINGS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTHONPATH", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of launch/ next to a .venv whose python prints its variables and arguments."""
    shutil.copytree(ROOT / "launch", tmp_path / "a root" / "launch")
    python = tmp_path / "a root" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\nenv | grep -E "^(CUDA|OMP|NCCL|TORCH|MALLOC|PYTHON|PYTORCH)" | sort\nprintf "%s\\n" "$@"\n'
    )
    python.chmod(0o755)
    return python.parents[2]


def launch(root: Path, *arguments: str, script: str = "stage1", **variables: str) -> subprocess.CompletedProcess:
    unset = (*SET_HERE, *DEFAULTS)
    kept = {name for name in os.environ if name not in unset and not name.startswith(("PET_", "SLURM_"))}
    environment = {name: os.environ[name] for name in kept}
    command = [root / "launch" / f"{script}.sh", *arguments]
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=20)


def started(root: Path, *arguments: str, **variables: str) -> tuple[dict[str, str], list[str], list[str]]:
    """The variables that were set, torchrun's arguments and the trainer's arguments."""
    done = launch(root, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = lines.index("-m")
    assert lines[start + 1] == "moelpr.torchrun"
    trainer = lines.index("moelpr.pretrain")
    return dict(line.split("=", 1) for line in lines[:start]), lines[start + 2 : trainer - 1], lines[trainer + 1 :]


def error_of(root: Path, *arguments: str, **variables: str) -> str:
    done = launch(root, *arguments, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    return done.stderr


@pytest.mark.parametrize(("visible", "processes"), [("4,5,7", 3), ("", 1), ("-1", 1), ("NoDevFiles", 1)])
def test_one_node_uses_every_gpu_or_one_process_and_a_free_port(root: Path, visible: str, processes: int) -> None:
    _, torchrun, trainer = started(root, "--lr", "1", CUDA_VISIBLE_DEVICES=visible)
    assert torchrun == ["--standalone", "--nnodes", "1", "--nproc-per-node", str(processes)]
    assert trainer == ["--stage", "stage1", "--lr", "1"]


def test_options_and_variables_are_equivalent(root: Path) -> None:
    options = "--nnodes 2 --node_rank=1 --master-addr node-a --master_port 4321 --nproc-per-node=3 --lr 1"
    variables = "NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a MASTER_PORT=4321 NPROC_PER_NODE=3"
    by_options = started(root, *options.split())
    by_variables = started(root, "--lr", "1", **dict(pair.split("=") for pair in variables.split()))
    assert by_options == by_variables
    assert by_options[1] == shlex.split(
        "--nnodes 2 --node-rank 1 --master-addr node-a --master-port 4321 --nproc-per-node 3"
    )


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [
        ("--nproc-per-node 2", "--nproc-per-node 2"),  # overrides the variable
        ("--master-port 4321", "--master-port 4321 --nproc-per-node 5"),
        (
            "--nnodes 2 --node-rank 0 --master-addr a --join-timeout 300",
            "--rdzv-conf timeout=300 --nproc-per-node 5",
        ),
    ],
)
def test_an_option_reaches_torchrun(root: Path, arguments: str, ending: str) -> None:
    assert shlex.join(started(root, *arguments.split(), NPROC_PER_NODE="5")[1]).endswith(ending)


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
    ],
)
def test_a_pod_and_a_task_of_srun_know_their_node(root: Path, tmp_path: Path, variables: str, changes: dict) -> None:
    """torchrun's own variables, a Job's and Slurm's; the more specific ones first."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames node-[a-b]" ] && echo "node-a\nnode-b"\n')
    (tmp_path / "scontrol").chmod(0o755)
    found = dict(pair.split("=") for pair in variables.split())
    path = f"{tmp_path}:{os.environ['PATH']}"
    expected = ON_NODE_1
    for before, after in changes.items():
        expected = expected.replace(before, after)
    assert shlex.join(started(root, CUDA_VISIBLE_DEVICES="0,1", PATH=path, **found)[1]) == expected


@pytest.mark.parametrize(
    "variables",
    [
        "JOB_COMPLETION_INDEX=3",  # jobs of their own
        "SLURM_NNODES=2 SLURM_JOB_NODELIST=node-[a-b] SLURM_NODEID=0",  # a batch script, or salloc
        "SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=1 SLURM_NODEID=0",
        "PET_NNODES=2 NNODES=1",
    ],
)
def test_one_node_stays_one(root: Path, variables: str) -> None:
    """Also for torchrun, which reads PET_NNODES too."""
    found = dict(pair.split("=") for pair in variables.split())
    assert started(root, CUDA_VISIBLE_DEVICES="", **found)[1][:3] == ["--standalone", "--nnodes", "1"]


def test_several_tasks_of_srun_on_a_node_and_an_elastic_job_are_refused(root: Path) -> None:
    tasks = dict(pair.split("=") for pair in SRUN.replace("TASKS=2", "TASKS=16").split())
    assert "--ntasks-per-node 1" in error_of(root, **tasks)
    assert "--nnodes must be a positive integer, got 1:4" in error_of(root, PET_NNODES="1:4")


def test_a_dry_run_prints_the_command_at_any_position(root: Path) -> None:
    arguments = ("--recipe", "my recipe.yaml", "--data-path", "0.3", "a$b", "1", "c'd")
    ran = launch(root, *arguments, "--nproc-per-node", "2")
    printed = [
        launch(root, "--dry-run", *arguments, "--nproc-per-node", "2"),
        launch(root, *arguments, "--nproc-per-node", "2", "--dry-run"),
    ]
    assert printed[0].stdout == printed[1].stdout
    copied = subprocess.check_output(["bash", "-c", printed[0].stdout], env={"PATH": os.environ["PATH"]}, text=True)
    inherited = {f"{name}={value}" for name, value in os.environ.items() if name not in (*SET_HERE, *DEFAULTS)}
    assert copied.splitlines() == [line for line in ran.stdout.splitlines() if line not in inherited]


def test_without_a_venv_python3_finds_the_repository_on_its_path(root: Path) -> None:
    shutil.rmtree(root / ".venv")
    arguments = shlex.split(launch(root, "--dry-run", PYTHONPATH="/mine").stdout)
    assert f"PYTHONPATH={root}:/mine" in arguments[: arguments.index("python3")]


def test_nccl_is_configured_with_gpus_and_the_allocator_without(root: Path) -> None:
    """Variables that are set are kept."""
    on_gpu, _, _ = started(root, CUDA_VISIBLE_DEVICES="0", NCCL_DEBUG="INFO", PYTHONWARNINGS="default")
    on_cpu, _, _ = started(root, CUDA_VISIBLE_DEVICES="", CUDA_DEVICE_MAX_CONNECTIONS="32")
    both = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "default", "NCCL_DEBUG": "INFO"}
    torch = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    assert on_gpu.items() >= (both | torch | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}).items()
    assert not any(name.startswith("MALLOC") for name in on_gpu)
    assert on_cpu.items() >= {"MALLOC_TRIM_THRESHOLD_": str(16 * 2**30), "MALLOC_MMAP_MAX_": "0"}.items()
    assert on_cpu["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert not {*torch, "PYTORCH_CUDA_ALLOC_CONF"} & on_cpu.keys()
    kept, _, _ = started(root, CUDA_VISIBLE_DEVICES="0", PYTORCH_ALLOC_CONF="max_split_size_mb:512")
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
def test_a_wrong_option_is_named_with_the_values_that_work(root: Path, arguments: str, option: str, found: str) -> None:
    error = error_of(root, *arguments.split())
    assert error.startswith("stage1.sh: error: ") and option in error and found in error


def test_no_flag_of_the_trainer_is_an_option_of_the_launcher() -> None:
    from moelpr.train.arguments.flags import all_arguments

    taken = {"dry_run", *map(str.lower, OPTIONS)}
    assert not taken & {flag.removeprefix("--").replace("-", "_") for flag in all_arguments().flags()}


def test_help_lists_every_option_with_its_variable_and_then_shows_the_trainers(root: Path) -> None:
    done = launch(root, "--help")
    names = {f"--{name.lower().replace('_', '-')}": name for name in OPTIONS}
    assert dict(re.findall(r"^  (--[\w-]+) +([A-Z_]+) ", done.stdout, re.MULTILINE)) == names
    assert done.stdout.endswith("-m\nmoelpr.pretrain\n--help\n")
    assert not any(line.startswith(("#", "set ")) for line in done.stdout.splitlines())
