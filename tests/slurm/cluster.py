"""A real Slurm on this machine, as a context: one controller, several nodes, two partitions, no accounts.

`high` preempts `low`: a job of `low` is asked to end and, after a grace period, requeued.
"""

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}


@contextmanager
def throwaway_cluster() -> Iterator["Cluster"]:
    """A cluster in a temporary folder; each rank uses one thread and no network."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        with Cluster(Path(folder, "cluster")) as cluster:
            cluster.environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            yield cluster


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


class Cluster:
    """Everything is in `folder`, whose name must be short, because socket names contain it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.nodes = folder, ["n1", "n2"]
        self._configuration = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen] = {}
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        # Variables for sbatch, scontrol and the like.
        self.environment = {**outer, "SLURM_CONF": str(self._configuration), "PATH": _path()}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        key = self.folder / "slurm.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self._configuration.write_text(self._settings(key))
        try:
            self._start("slurmctld", "-D", "-i")
            for node in self.nodes:
                (self.folder / node).mkdir()
                self.start_node(node)
                # One by one: all slurmd of a machine bind the same /run/slurm/sack.socket when they start.
                self.until(lambda out=self.folder / f"{node}.out": "slurmd started" in out.read_text())
            self.until(lambda: self("sinfo", "-h", "-t", "idle", "-p", "low", "-N", "-o", "%N").split() == self.nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the jobs while their nodes run, then the daemons, then remaining processes of jobs."""
        if self._daemons:
            self("scancel", "--user", getpass.getuser(), check=False)
            deadline = time.monotonic() + 15
            while self("squeue", "-h", check=False) and time.monotonic() < deadline:
                time.sleep(0.3)
        for process in [*self._daemons.values(), *_with_their_slurmstepd(self.processes())]:
            process.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons = {}

    def __call__(self, *command: str, check: bool = True) -> str:
        """Run a command of Slurm and return its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def submit(self, *arguments: object) -> str:
        """Submit a job and return its ID."""
        return self("sbatch", "--parsable", *map(str, arguments))

    def job(self, job_id: str) -> dict[str, str]:
        """The job's fields, named as by scontrol."""
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", self("scontrol", "--oneliner", "show", "job", job_id)))

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def wait(self, job_id: str, timeout_s: float = 120) -> str:
        """Wait until the job has ended, without a requeue, and return its state."""
        self.until(lambda: self.state(job_id) in _ENDED, timeout_s)
        return self.state(job_id)

    def until(self, condition: Callable[[], object], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                queue = self("squeue", "-o", "%i %j %T %r", check=False)
                raise TimeoutError(f"condition not met after {timeout_s:g} s; the queue:\n{queue}\n{self._log()}")
            time.sleep(0.3)

    def start_node(self, node: str) -> None:
        self._start(node, "-D", "-N", node, program="slurmd")

    def kill_node(self, node: str) -> None:
        """Kill the node's daemon, like a power failure; no job may be running there."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def preempt(self) -> str:
        """Submit a job of a higher-priority partition that requests all nodes, and return its ID."""
        return self.submit("-p", "high", "--nodes", 2, "--exclusive", "--output", "/dev/null", "--wrap", "true")

    def processes(self, job: str | None = None) -> list[psutil.Process]:
        """All processes of jobs, or of one, found by their environment, because some start sessions."""
        actual = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                is_of_job = environment.get("SLURM_JOB_ID") == job if job else "SLURM_JOB_ID" in environment
                if is_of_job and environment.get("SLURM_CONF") == str(self._configuration):
                    actual.append(process)
        return actual

    def _start(self, name: str, *arguments: str, program: str = "slurmctld") -> None:
        environment = {**self.environment, "SLURM_SACK_KEY": str(self.folder / "slurm.key")}
        with (self.folder / f"{name}.out").open("a") as out:
            self._daemons[name] = subprocess.Popen(
                [program, *arguments], env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def _log(self) -> str:
        logs = {path.name: path.read_text(errors="replace").splitlines() for path in sorted(self.folder.glob("*.out"))}
        return "\n".join(f"{name}: {line}" for name, lines in logs.items() for line in lines[-8:])

    def _settings(self, key: Path) -> str:
        ports = _free_ports(1 + len(self.nodes))
        user, folder = getpass.getuser(), self.folder
        of_node = "NodeName={} NodeAddr=127.0.0.1 Port={} CPUs=32 RealMemory=100000".format
        nodes = "\n".join(map(of_node, self.nodes, ports[1:]))
        every = ",".join(self.nodes)
        return f"""
ClusterName=throwaway
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
# A key instead of munge; short-lived credentials, because a requeued job waits until they expire.
AuthType=auth/slurm
CredType=auth/slurm
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=15
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=20
{nodes}
PartitionName=low Nodes={every} Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes={every} PriorityTier=10 PreemptMode=OFF
"""


def _with_their_slurmstepd(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Prepend the slurmstepd of each, which is not found by its environment because it overwrites it."""
    parents = {parent for process in processes if (parent := process.parent()) is not None}
    return [parent for parent in parents if parent.name() == "slurmstepd"] + processes


def _path() -> str:
    """PATH with sbin, where the daemons are."""
    return f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
