"""The routing of the demo's models, and routers that are made to choose as theirs do."""

from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.demo_tasks import COPIES, NUM_NEW_EXPERTS, TOPK
from examples.languages import EXPANDED, held_out_files
from moelpr.base.errors import UserError
from moelpr.data.text.reading import read_documents
from moelpr.measure.evaluate.models import load_model
from moelpr.model.stages import MoeStage

LENGTH, WINDOWS = 128, 16  # tokens that the demo trains on at a time; such windows of each language
MARGIN = 20.0  # far above the differences between the logits of a router that has just been initialized


@dataclass(frozen=True)
class RecordedRouting:
    """Choices of a model's routers; the first `original_copies` of its places are copies of the dense FFN."""

    choices_TK: Tensor  # places, of tokens of all layers and languages in equal parts, in random order
    new_experts: int
    original_copies: int

    @property
    def experts(self) -> dict[str, int]:
        """As benchmarks.common.SIZES names them."""
        topk = self.choices_TK.shape[1]
        return {"new_experts": self.new_experts, "original_copies": self.original_copies, "topk": topk}

    def part(self, number: int, num_tokens: int) -> Tensor:
        """Choices [num_tokens, K] of part `number` of the tokens; parts do not overlap."""
        first, last = number * num_tokens, (number + 1) * num_tokens
        if last > len(self.choices_TK):
            raise UserError(f"the demo's routing has {len(self.choices_TK):,} tokens, not {last:,}; pass smaller sizes")
        return self.choices_TK[first:last]


def uniform_choices(num_tokens: int, num_experts: int, topk: int, generator: torch.Generator) -> Tensor:
    """[T, K] different experts of each token."""
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :topk]


@torch.no_grad()
def recorded_routing(demo: Path | None, stage: MoeStage) -> RecordedRouting:
    """The choices of the routers of the model after `stage` on held-out text of the languages that the stage trains on.

    These are the expanded languages, in stage 2 all of them, each with the same number of tokens. Without a demo, the
    choices are random, among as many experts.

    Raises:
        UserError: the demo is missing or incomplete.
    """
    if demo is None:
        choices_TK = uniform_choices(1 << 18, NUM_NEW_EXPERTS + COPIES, TOPK, torch.Generator().manual_seed(0))
        return RecordedRouting(choices_TK, NUM_NEW_EXPERTS, COPIES)
    model = demo / f"{stage}-hf"
    files = [path for name, path in held_out_files(demo / "corpus").items() if stage == "stage2" or name in EXPANDED]
    if missing := [path for path in (model, *files) if not path.exists()]:
        raise UserError(f"{missing[0]} is missing; run `make demo`, or pass the folder of a finished demo as --demo")
    loaded = load_model(model, device="cpu")
    recorded: list[Tensor] = []
    for router in loaded.routers.values():
        router.register_forward_hook(
            lambda *call: recorded.append(loaded.router_logits(*call).topk(loaded.topk, dim=-1).indices)
        )
    for path in files:
        documents = loaded.tokenizer(read_documents(path), add_special_tokens=False)["input_ids"]
        windows = [window for ids in documents for window in batched([loaded.start_id, *ids], LENGTH)]
        full = [window for window in windows if len(window) == LENGTH]
        if len(full) < WINDOWS:
            raise UserError(f"{path} has {len(full)} windows of {LENGTH} tokens, expected at least {WINDOWS}")
        loaded.logits(torch.tensor(full[:WINDOWS]))
    choices_TK = torch.cat(recorded)
    shuffled = choices_TK[torch.randperm(len(choices_TK), generator=torch.Generator().manual_seed(0))]
    first: Any = next(iter(loaded.routers.values()))
    num_experts = first.weight.shape[0]
    return RecordedRouting(shuffled, num_experts - loaded.num_original_places, loaded.num_original_places)


def impose(router: Any, choices_TK: Tensor) -> None:
    """Make a router, whose `gating` returns logits [..., experts], choose `choices_TK`; its gradients stay its own."""
    gating, raised_TK = router.gating, torch.full(choices_TK.shape, MARGIN, device=choices_TK.device)

    def imposed(hidden: Tensor) -> Tensor:
        logits = gating(hidden)
        shape = (*logits.shape[:-1], choices_TK.shape[1])
        return logits.scatter_add(-1, choices_TK.view(shape), raised_TK.view(shape).to(logits.dtype))

    router.gating = imposed
