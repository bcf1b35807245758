"""A stage that runs long enough to be interrupted, submitted as a user would."""

from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.material import TRAINING_FLAGS, make_corpus, make_model, metrics

STEPS = 60


class Stage:
    """Stage 1 of the tiny model on two nodes, slow enough to be interrupted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
        from moelpr.families.new_experts import NewExperts

        self.cluster, self.folder = cluster, folder
        self.start, self.data = folder / "upcycled", make_corpus(folder)
        hf_to_mcore(make_model(folder), self.start, NewExperts(4, topk=2))

    def submit(self, name: str, *options: object) -> str:
        words = ["--pretrained-checkpoint", self.start, "--data-path", self.data, "--save", self.folder / name]
        words += [*TRAINING_FLAGS, "--train-iters", STEPS, "--global-batch-size", 16, "--save-interval", 25]
        options = ("--nodes", 2, "--job-name", name, "--output", self.folder / f"{name}.log", *options)
        return self.cluster.submit(*options, "launch/slurm/stage.sbatch", "stage1", *words)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until_step(self, name: str, step: int) -> int:
        """Wait until the run has made this step; returns its current step."""
        self.cluster.until(lambda: len(metrics(self.folder / name)) >= step, timeout_s=90)
        return len(metrics(self.folder / name))

    def saved_step(self, name: str) -> int:
        return int((self.folder / name / "latest_checkpointed_iteration.txt").read_text())
