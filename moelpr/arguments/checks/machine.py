"""What a machine without Transformer Engine lacks."""

from collections.abc import Iterable

from moelpr.arguments.checks.run import Run


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


def grouped_gemm_is_transformer_engines(run: Run) -> Iterable[str]:
    if run.is_moe and run.args.moe_grouped_gemm and run.args.transformer_impl == "local":
        yield (
            "--moe-grouped-gemm asks for Transformer Engine's grouped experts; install transformer-engine, or drop the "
            "flag: without it the experts are grouped products of PyTorch's"
        )


CHECKS = (attention_is_torchs_without_transformer_engine, grouped_gemm_is_transformer_engines)
