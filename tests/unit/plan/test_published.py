"""Predicted against published tokens/s, which docs/design/planner.md lists; none of these runs is moelpr's."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from moelpr.model.model_spec import ModelSpec, MoeSpec
from moelpr.plan.gpus import GPUS, Cluster
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import Routing, Workload, model_parts, stage_memories
from moelpr.plan.step_time import FITTED_ERROR, PAPER_ERROR, step_time
from tests.unit.conftest import SHAPE

PAGE = Path(__file__).parents[3] / "docs/design/planner.md"
DENSE = Routing(1, 0)  # one row per token through the original expert


def model(family: str, *sizes: int) -> ModelSpec:
    hidden, ffn, layers, heads, groups, head, vocabulary, new_experts, topk = sizes
    shape = SHAPE | dict(hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers, num_attention_heads=heads)
    shape |= dict(num_query_groups=groups, kv_channels=head, vocab_size=vocabulary, max_position_embeddings=8192)
    shape |= dict(untie_embeddings_and_output_weights=True, add_qkv_bias=family == "qwen2")
    shape["qk_layernorm"] = family == "qwen3"
    return ModelSpec(family, "bfloat16", shape, MoeSpec(new_experts, topk, tuple(range(layers))))


@dataclass(frozen=True)
class Published:
    """A run: model, layout and batch (sequence length, micro-batch, global batch), and its tokens/s per GPU.

    A dense model is one whose tokens all choose the original expert; a published MoE one without an original expert.
    """

    name: str
    spec: ModelSpec
    gpu: str
    layout: PlannedLayout
    batch: tuple[int, int, int]
    tokens_per_s: float
    routing: Routing | None = None
    stage: str = "stage1"
    train_everything: bool = False

    @property
    def predicted(self) -> float:
        workload = Workload(self.stage, *self.batch, train_everything=self.train_everything)  # type: ignore[arg-type]
        parts = model_parts(self.spec)
        gpu = GPUS[self.gpu]
        cluster = Cluster(self.layout.world_size, 8, gpu.memory_gib, 0, gpu)
        memories = stage_memories(self.spec, parts, self.layout, workload, self.routing)
        time = step_time(self.spec, parts, self.layout, workload, cluster, memories, self.routing)
        return time.tokens_per_s(workload, cluster)

    @property
    def row(self) -> str:
        predicted = self.predicted
        return (
            f"| {self.name} | {self.layout.world_size} × {self.gpu} | {self.tokens_per_s:,.0f} | {predicted:,.0f} | "
            f"{predicted / self.tokens_per_s - 1:+.0%} |"
        )


QWEN3_30B = model("qwen3", 2048, 768, 48, 32, 4, 128, 151936, 128, 8)
GPT_OSS_120B = model("llama", 2880, 2880, 36, 64, 8, 64, 201088, 128, 4)
LLAMA3_8B = model("llama", 4096, 14336, 32, 32, 8, 128, 128256, 1, 2)
QWEN25_7B = model("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 1, 2)
QWEN25_32B = model("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, 1, 2)
H100, B200 = "h100-80", "b200-192"


def moe(name: str, spec: ModelSpec, gpu: str, layout: PlannedLayout, batch: tuple[int, int], rate: float) -> Published:
    """All experts are new and everything trains, on sequences of 4,096 tokens."""
    assert spec.moe is not None
    return Published(name, spec, gpu, layout, (4096, *batch), rate, Routing(0, spec.moe.topk), train_everything=True)


def lora(name: str, spec: ModelSpec, layout: PlannedLayout, rate: float) -> Published:
    return Published(f"AutoModel: {name}", spec, H100, layout, (4096, 2, 32), rate, DENSE, stage="stage2")


L = PlannedLayout
QWEN15 = model("qwen2", 2048, 5504, 24, 16, 16, 128, 151936, 5, 2)
RATE = 45856 * 512 * 1024 / (848 * 3600)
PAPER = Published("the paper: Qwen1.5-1.8B, 5 new experts, stage 1", QWEN15, "a800-80", L(dp=8), (1024, 8, 512), RATE)
BRIDGE_30B, BRIDGE_120B = "Megatron-Bridge: Qwen3-30B-A3B, EP 16", "Megatron-Bridge: GPT-OSS-120B"
COMPARABLE = [
    moe(f"{BRIDGE_30B}, all-to-all", QWEN3_30B, H100, L(ep=16, dp=16), (1, 1024), 1024 * 4096 / 45.65 / 16),
    moe(f"{BRIDGE_120B}, PP 4, EP 8", GPT_OSS_120B, H100, L(pp=4, ep=8, dp=16), (1, 1280), 5824),
    moe(f"{BRIDGE_120B}, EP 8", GPT_OSS_120B, B200, L(ep=8, dp=64), (4, 1280), 13568),
    moe("AutoModel: Qwen3-30B-A3B, EP 8", QWEN3_30B, H100, L(ep=8, dp=8), (4, 512), 12040),
    lora("Llama-3-8B, LoRA", LLAMA3_8B, L(), 12473),
    lora("Qwen2.5-7B, LoRA", QWEN25_7B, L(), 14110),
]
# Another dispatcher, which sends a token once per node and overlaps with compute; weights that are gathered (FSDP).
DIFFERENT = [
    moe(f"{BRIDGE_30B}, HybridEP", QWEN3_30B, H100, L(ep=16, dp=16), (1, 1024), 1024 * 4096 / 20.147 / 16),
    lora("Qwen2.5-32B, LoRA, TP 2, FSDP", QWEN25_32B, L(tp=2, dp=4), 2250),
]


def test_predictions_are_off_by_what_the_planner_says() -> None:
    fitted = [round(run.predicted / run.tokens_per_s - 1, 2) for run in COMPARABLE]
    assert (min(fitted), max(fitted)) == FITTED_ERROR
    assert round(PAPER.predicted / PAPER.tokens_per_s - 1, 2) == PAPER_ERROR


@pytest.mark.parametrize("run", [PAPER, *COMPARABLE, *DIFFERENT], ids=lambda run: run.name)
def test_the_design_page_lists_the_prediction(run: Published) -> None:
    assert run.row in PAGE.read_text("utf-8")
