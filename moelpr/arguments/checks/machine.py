"""What a machine without Transformer Engine lacks."""

from collections.abc import Iterable

from moelpr.arguments import machine
from moelpr.arguments.checks.run import Run
from moelpr.megatron_patches import cpu

# What torch.nn.functional.grouped_mm asks of a row in bf16 on a GPU: 16 bytes.
_ALIGNMENT = 8


def attention_is_torchs_without_transformer_engine(run: Run) -> Iterable[str]:
    if run.args.transformer_impl != "local":
        return
    needs = {
        "--context-parallel-size": run.args.context_parallel_size > 1,
        "--attention-dropout": run.args.attention_dropout > 0,
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


def precision_aware_adam_is_transformer_engines(run: Run) -> Iterable[str]:
    if run.args.use_precision_aware_optimizer and not machine.is_installed("transformer_engine"):
        yield "--use-precision-aware-optimizer needs Transformer Engine's Adam; install transformer-engine, or drop it"


def rows_of_grouped_products_are_aligned(run: Run) -> Iterable[str]:
    if not run.is_moe or cpu.is_needed() or run.args.moe_grouped_gemm:
        return
    hidden, ffn, etp = run.shape["hidden_size"], run.shape["moe_ffn_hidden_size"], run.layout.etp
    if hidden % _ALIGNMENT:
        yield f"hidden size {hidden} is no multiple of {_ALIGNMENT}, which grouped products on a GPU need"
    if ffn % (etp * _ALIGNMENT) and ffn % etp == 0:
        remedy = "use --expert-tensor-parallel-size 1" if etp > 1 and ffn % _ALIGNMENT == 0 else "use another model"
        yield (
            f"{ffn} FFN rows over --expert-tensor-parallel-size {etp} make {ffn // etp} per rank, no multiple of "
            f"{_ALIGNMENT}, which grouped products on a GPU need; {remedy}"
        )


CHECKS = (
    attention_is_torchs_without_transformer_engine,
    grouped_gemm_is_transformer_engines,
    precision_aware_adam_is_transformer_engines,
    rows_of_grouped_products_are_aligned,
)
