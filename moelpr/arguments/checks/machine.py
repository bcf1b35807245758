"""What this machine lacks: Transformer Engine's attention, and a GPU."""

from collections.abc import Iterable

from moelpr.arguments.checks.run import Run
from moelpr.compat import cpu


def attention_is_torchs_without_transformer_engine(run: Run) -> Iterable[str]:
    if run.args.transformer_impl != "local":
        return
    needs = {
        "--context-parallel-size": run.args.context_parallel_size > 1,
        "--attention-dropout": run.args.attention_dropout > 0,
        "--window-size": run.args.window_size is not None,
    }
    for flag, is_set in needs.items():
        if is_set:
            yield f"{flag} needs Transformer Engine's attention; install transformer-engine, or drop the flag"


def gloo_gathers_even_rows_only(run: Run) -> Iterable[str]:
    if cpu.is_needed() and run.is_moe and run.layout.etp > 1:
        yield (
            "expert tensor parallelism gathers uneven rows, which gloo cannot; on a CPU add "
            "--expert-tensor-parallel-size 1"
        )


CHECKS = (attention_is_torchs_without_transformer_engine, gloo_gathers_even_rows_only)
