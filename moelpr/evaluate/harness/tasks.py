"""Which tasks of lm-evaluation-harness stand for which benchmark and language."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelpr.errors import UserError
from moelpr.yaml_files import read_mapping

PAPER_TASKS = Path(__file__).with_name("paper_tasks.yaml")
# These are shares in the harness's results; others (chrf, bleu) go from 0 to 100 already.
SHARES = ("acc", "acc_norm", "exact_match", "f1")


@dataclass(frozen=True)
class Benchmark:
    """One column of the paper's Table 1."""

    name: str
    num_fewshot: int  # examples before each question
    metric: str  # key in the harness's results
    tasks: dict[str, tuple[str, ...]]  # language -> the harness's names; their mean is the language's score

    @property
    def scale(self) -> float:
        """To numbers from 0 to 100, as in the paper."""
        return 100.0 if self.metric in SHARES else 1.0


def read_benchmarks(path: Path, languages: Sequence[str]) -> list[Benchmark]:
    """The table in `path` (see paper_tasks.yaml), cut to `languages`; benchmarks that have none of them are left out.

    Raises UserError for a file that is no such table, and where nothing is left.
    """
    try:
        content = read_mapping(path, "table of tasks")
        table = [_benchmark(name, entry, languages) for name, entry in content.items()]
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).replace("\n", " ")
        raise UserError(
            f"{path} is no table of tasks ({reason}); each benchmark needs num_fewshot, metric and tasks, as in "
            f"{PAPER_TASKS.name}"
        ) from error
    table = [benchmark for benchmark in table if benchmark.tasks]
    if not table:
        raise UserError(
            f"{path} has no task for {', '.join(languages)}; name other --languages or another --tasks file"
        )
    return table


def _benchmark(name: Any, entry: dict[str, Any], languages: Sequence[str]) -> Benchmark:
    tasks = {
        # YAML takes the Norwegian code for a boolean.
        ("no" if language is False else language): (names,) if isinstance(names, str) else tuple(names)
        for language, names in entry["tasks"].items()
    }
    chosen = {language: tasks[language] for language in languages if language in tasks}
    return Benchmark(str(name), int(entry["num_fewshot"]), str(entry["metric"]), chosen)
