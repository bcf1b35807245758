"""What needs Transformer Engine is refused where it is missing."""

import pytest


@pytest.fixture(autouse=True)
def no_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from moelpr.arguments import machine

    monkeypatch.setattr(machine, "is_installed", lambda module: False)


def test_attention_has_no_dropout_or_context_parallelism_without_transformer_engine(upcycled: str, refused) -> None:
    words = ["--attention-dropout", "0.1", "--context-parallel-size", "2"]
    assert refused("stage1", upcycled, *words, ranks=2) == [
        f"{flag} needs Transformer Engine's attention; install transformer-engine, or drop the flag"
        for flag in ("--context-parallel-size", "--attention-dropout")
    ]


def test_grouped_gemm_is_transformer_engines(upcycled: str, refused) -> None:
    (said,) = refused("stage1", upcycled, "--moe-grouped-gemm")
    assert said.startswith("--moe-grouped-gemm asks for Transformer Engine's grouped experts; install")


def test_expert_tensor_parallelism_needs_no_gpu(upcycled: str, accepted) -> None:
    assert accepted("stage1", upcycled, "--tensor-model-parallel-size", "2", ranks=2)["sequence_parallel"]


def test_the_precision_aware_adam_is_transformer_engines(upcycled: str, refused) -> None:
    said = refused("stage1", upcycled, "--use-precision-aware-optimizer", "--use-distributed-optimizer")
    assert said == [
        "--use-precision-aware-optimizer needs Transformer Engine's Adam; install transformer-engine, or drop it"
    ]


@pytest.mark.parametrize(
    ("shape", "words", "said"),
    [
        ({"hidden_size": 36}, [], "hidden size 36 is no multiple of 8"),
        ({"ffn_hidden_size": 44}, [], "44 FFN rows over --expert-tensor-parallel-size 1 make 44 per rank"),
        (
            {},
            ["--tensor-model-parallel-size", "4"],
            "48 FFN rows over --expert-tensor-parallel-size 4 make 12 per rank",
        ),
    ],
)
def test_rows_that_a_gpus_grouped_products_cannot_take_are_said(
    make_checkpoint, refused, monkeypatch: pytest.MonkeyPatch, shape: dict, words: list[str], said: str
) -> None:
    from moelpr.megatron_patches import cpu

    start = make_checkpoint("start", shape=shape)
    with monkeypatch.context() as gpu:
        gpu.setattr(cpu, "is_needed", lambda: False)
        assert [line for line in refused("stage1", start, *words, ranks=4) if line.startswith(said)]
