"""Start one training stage on this node with torchrun.

    moelpr train STAGE [LAUNCHER OPTIONS] [TRAINER ARGUMENTS]        or launch/STAGE.sh, in a clone

Launcher options, spelled as torchrun's (dashes or underscores, "--nnodes 2" or "--nnodes=2"), or variables:
  --nproc-per-node  NPROC_PER_NODE  number of processes on this node (default: its number of GPUs, or 1 without GPUs)
  --nnodes          NNODES          number of nodes (default: 1)
  --node-rank       NODE_RANK       rank of this node, 0 to nnodes-1 (required with several nodes)
  --master-addr     MASTER_ADDR     name or address of node 0 (required with several nodes)
  --master-port     MASTER_PORT     a free port of node 0 (default: 29500; on a single node any free port)
  --join-timeout    JOIN_TIMEOUT    timeout for nodes to join, in seconds (default: 45)
  --dry-run                         print the command and the variables set here instead of running it

Options override environment variables. What neither gives is taken from torchrun's variables, which Kubeflow sets
(PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR, PET_MASTER_PORT), from JOB_COMPLETION_INDEX (the node
rank in an Indexed Job or JobSet), and from Slurm's, if srun has started this command on several nodes.
All other arguments go to the trainer. Examples are in docs/running.md.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from glob import glob
from typing import NoReturn

from moelpr.base import machine
from moelpr.base.errors import UserError

OPTIONS = ("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--join-timeout")


def launch(stage: str, words: Iterable[str]) -> None:
    """Become torchrun for a stage, or print the help or the command."""
    is_dry_run, options, arguments = False, {}, []
    words = iter(words)
    for word in words:
        given, has_value, value = word.partition("=")
        option = given.replace("_", "-")
        if option in ("-h", "--help"):
            print(__doc__, flush=True)
            become([sys.executable, "-m", "moelpr.pretrain", "--help"])
        elif option == "--dry-run":
            is_dry_run = True
        elif option in OPTIONS:
            value = value if has_value else next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"{given} expects a value; pass {given} VALUE")
            options[option[2:].replace("-", "_").upper()] = value
        else:
            arguments.append(word)
    gpus = visible_gpus()
    where = place({name: value for name, value in os.environ.items() if value} | options, gpus)
    command = [sys.executable, "-m", "moelpr.torchrun", *where, "-m", "moelpr.pretrain", "--stage", stage, *arguments]
    variables = {name: os.environ.get(name) or value for name, value in defaults(gpus).items()}
    if is_dry_run:
        print(*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command))
        return
    from moelpr.train.arguments.early import check_start  # only now, as it takes a moment

    check_start(stage, arguments)  # the trainer would report it some seconds later
    os.environ |= variables
    become(command)


def become(command: list[str]) -> NoReturn:
    """Run a command in the place of this process, whose number and signals it gets."""
    os.execv(command[0], command)


def visible_gpus() -> int:
    """The number of GPUs that this process may use; asking the driver would slow down every start."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = [gpu for gpu in visible.split(",") if gpu]
        return 0 if gpus[:1] in (["-1"], ["NoDevFiles"]) else len(gpus)
    is_wsl = os.path.exists("/dev/dxg")
    return len(glob("/dev/nvidia[0-9]*")) or (len(lines_of("nvidia-smi", "-L")) if is_wsl else 0)


def sharing_gpus(gpus: int, micro_batches: int) -> int:
    """The most of so many GPUs that get equally many micro-batches of a step."""
    return max((number for number in range(1, gpus + 1) if micro_batches % number == 0), default=0)


def lines_of(*command: str) -> list[str]:
    """The output of a command; nothing if it fails or is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def place(settings: dict[str, str], gpus: int) -> list[str]:
    """The options of torchrun that `settings`, variables and options under the names of variables, ask for."""
    if not settings.keys() & {"NNODES", "PET_NNODES"} and int(settings.get("SLURM_STEP_NUM_NODES", 1)) > 1:
        settings = of_srun(settings) | settings

    def first(*names: str, default: str = "") -> str:
        return next((settings[name] for name in names if name in settings), default)

    nnodes = first("NNODES", "PET_NNODES", default="1")
    least, _, most = nnodes.partition(":")  # torchrun's MIN:MAX
    nnodes = least if least == most else nnodes
    rank = first("NODE_RANK", "PET_NODE_RANK", *(["JOB_COMPLETION_INDEX"] if nnodes != "1" else []))
    address, port = first("MASTER_ADDR", "PET_MASTER_ADDR"), first("MASTER_PORT", "PET_MASTER_PORT")
    processes, timeout = first("NPROC_PER_NODE", "PET_NPROC_PER_NODE", default="auto"), first("JOIN_TIMEOUT")
    by_name = {"auto": gpus or 1, "gpu": gpus, "cpu": machine.available_cpus()}
    processes = str(by_name.get(processes, processes))
    numbers = {"nnodes": nnodes, "nproc-per-node": processes, "master-port": port, "join-timeout": timeout}
    for name, value in numbers.items():
        if value and not re.fullmatch("[1-9][0-9]*", value):
            raise UserError(f"--{name} must be a positive integer, got {value}")
    if nnodes == "1" and not port:  # any free port, so that two runs on one machine never collide
        return ["--standalone", "--nnodes", "1", "--nproc-per-node", processes]
    if nnodes == "1":
        rank, address = rank or "0", address or "127.0.0.1"
    if not rank:
        raise UserError(f"--nnodes {nnodes} requires --node-rank; pass 0 to {int(nnodes) - 1}")
    if not re.fullmatch("[0-9]+", rank) or int(rank) >= int(nnodes):
        raise UserError(f"--node-rank must be an integer from 0 to {int(nnodes) - 1}, got {rank}")
    if not address:
        raise UserError(f"--nnodes {nnodes} requires --master-addr; pass the name or address of node 0")
    where = ["--nnodes", nnodes, "--node-rank", rank, "--master-addr", address, "--master-port", port or "29500"]
    where += ["--rdzv-conf", f"timeout={timeout}"] if timeout else []
    return [*where, "--nproc-per-node", processes]


def of_srun(settings: dict[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of srun, which has started one per node."""
    nodes, tasks = settings["SLURM_STEP_NUM_NODES"], settings["SLURM_STEP_NUM_TASKS"]
    if tasks != nodes:
        raise UserError(
            f"srun has started {tasks} tasks on {nodes} nodes, and one per node starts all ranks; "
            "pass srun --ntasks-per-node 1"
        )
    names = lines_of("scontrol", "show", "hostnames", settings["SLURM_STEP_NODELIST"])
    address = {"PET_MASTER_ADDR": names[0]} if names else {}
    port = str(20000 + int(settings["SLURM_JOB_ID"]) % 10000)
    return {"PET_NNODES": nodes, "PET_NODE_RANK": settings["SLURM_NODEID"], "PET_MASTER_PORT": port} | address


def defaults(gpus: int) -> dict[str, str]:
    """Variables that the ranks get unless the user has set them."""
    variables = {
        # A single queue to the GPU: kernels start in the order of their launch, so a collective launched before the
        # GEMM that overlaps it does not wait for that GEMM. Up to Hopper, Megatron requires this for tensor and context
        # parallelism. Since Blackwell nothing requires it.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # Otherwise each rank warns about optional packages at every import.
        "PYTHONWARNINGS": "ignore",
    }
    if path := os.environ.get("PYTHONPATH"):  # where moelpr is found if it is not installed
        variables["PYTHONPATH"] = path
    if not gpus:
        # Otherwise glibc returns every large tensor to the system, whose pages are zeroed again in the next step.
        return variables | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
    if not os.environ.get("PYTORCH_ALLOC_CONF"):
        # The number of rows of an expert changes in every layer and step, which leaves gaps in blocks of fixed size.
        variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return variables | {
        # Kernels that Triton compiles, on a disk of this node: a home folder of 1,000 ranks may be on NFS.
        "TRITON_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"triton-{os.getuid()}"),
        # NCCL is silent by default; at this level it reports why it fails. Settings of the network are the site's.
        "NCCL_DEBUG": "WARN",
        # A rank whose collective fails or hangs exits (and torchrun ends the others) instead of blocking the GPUs, and
        # dumps each rank's last collectives. These are PyTorch's defaults, set here because we depend on them.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
