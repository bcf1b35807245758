"""Runs the trainer's forward step on fake CUDA tensors, for every case, and an optimizer step.

    python -m tests.fake_gpu.forwards

prints, as JSON, the loss's type and the places where the host waits for the GPU.
"""

import json
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any

from tests.unit.conftest import SHAPE as TINY_SHAPE

DEVICES = 8
BATCH, SEQUENCE, HIDDEN = 4, 64, 256
NEW_EXPERTS, TOPK = 4, 2
ROWS = 20  # rows of each new expert from each rank
RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]},
}
SHAPE = TINY_SHAPE | dict(num_layers=2, hidden_size=HIDDEN, ffn_hidden_size=512, max_position_embeddings=SEQUENCE)
SHAPE |= dict(kv_channels=64, vocab_size=512)


@dataclass(frozen=True)
class Case:
    stage: str = "stage2"
    originals: int = 1  # m
    copies: int = 1  # C
    tp: int = 1  # with sequence parallelism
    ep: int = 1
    etp: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "stage1": Case("stage1"),
    "stage2": Case("stage2"),
    "stage1, m=2": Case("stage1", originals=2),
    "stage2, m=2, C=2": Case(originals=2, copies=2),
    "stage1, full recompute": Case("stage1", settings=RECOMPUTE["full"]),
    "stage2, m=2, selective recompute": Case(originals=2, settings=RECOMPUTE["selective"]),
    "stage2, documents apart": Case(settings={"dataloader_inter_document_masking": True}),
    "stage1, documents apart, window, full recompute": Case(
        "stage1", settings={"dataloader_inter_document_masking": True, "window_size": (16, 0), **RECOMPUTE["full"]}
    ),
    "stage2, EP4": Case(ep=4),
    "stage1, C=2, EP2": Case("stage1", copies=2, ep=2),
    "stage2, TP2": Case(tp=2),
    "stage1, m=2, TP2, EP2, ETP2": Case("stage1", originals=2, tp=2, ep=2, etp=2),
}


def main() -> None:
    warnings.simplefilter("ignore")
    from moelpr.dry_run import fake_megatron
    from tests.fake_gpu import fake_cuda

    fake_cuda.install(DEVICES)
    fake_megatron.route_uniformly(ROWS)
    print(json.dumps({name: _outcome(case) for name, case in CASES.items()} | {"optimizer": optimizer_step()}))


def _outcome(case: Case) -> dict[str, Any]:
    try:
        return run(case)
    except Exception:
        return {"error": traceback.format_exc()}


def run(case: Case) -> dict[str, Any]:
    """The loss's type, and the host's waits: of each MoE layer, and of the rest."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moelpr.data.batch import Batch, GlobalCounts
    from moelpr.model.freezing import freeze
    from moelpr.model.layer import OverlappedOriginalExperts
    from moelpr.model.loading import build_model
    from moelpr.model_spec import ModelSpec, MoeSpec
    from moelpr.training import forward_step as trainers
    from tests.fake_gpu.fake_cuda import DEVICE, HostSyncs

    parallel_state.destroy_model_parallel()
    groups = {"expert_model_parallel_size": case.ep, "expert_tensor_parallel_size": case.etp}
    parallel_state.initialize_model_parallel(case.tp, create_gloo_process_groups=False, **groups)
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, BATCH * DEVICES, BATCH, DEVICES // case.tp)
    OverlappedOriginalExperts.side_stream = None
    moe = MoeSpec(NEW_EXPERTS, TOPK, (0, 1), case.originals, case.copies)
    settings = dict(bf16=True, params_dtype=torch.bfloat16, lpr_loss_coeff=0.1, moe_aux_loss_coeff=1e-3)
    settings |= dict(perform_initialization=False, use_cpu_initialization=False, tensor_model_parallel_size=case.tp)
    settings |= dict(sequence_parallel=case.tp > 1, expert_model_parallel_size=case.ep)
    settings |= dict(expert_tensor_parallel_size=case.etp, **case.settings)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model_parallel_cuda_manual_seed(1)
        with DEVICE:
            model = build_model(ModelSpec("qwen2", "bfloat16", SHAPE, moe), **settings).train()
        freeze([model], case.stage)

        def per_token(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(BATCH, SEQUENCE, dtype=dtype, device=DEVICE)

        counts = GlobalCounts(*(torch.empty((), device=DEVICE) for _ in range(2)))
        dtypes = (torch.int64, torch.int64, torch.float32, torch.int64, torch.bool, torch.bool)
        trainers._reader.next = lambda *args, **kwargs: Batch(*map(per_token, dtypes), counts=counts)
        syncs, layers = HostSyncs(number=ROWS), []
        for layer in model.decoder.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: layers.append([len(syncs.places)]))
            layer.mlp.register_forward_hook(lambda *_: layers[-1].append(len(syncs.places)))
        with syncs:
            output, next_token_loss = trainers.forward_step(None, model)
            loss, _, _ = next_token_loss(output)
    inside = [syncs.places[start:stop] for start, stop in layers]
    outside = [place for number, place in enumerate(syncs.places) if not any(a <= number < b for a, b in layers)]
    return {"loss": f"{loss.dtype} {loss.device}", "output": list(output.shape), "layers": inside, "outside": outside}


def optimizer_step() -> dict[str, Any]:
    """The host's waits in a step of the optimizer that the trainer has without Transformer Engine and Apex."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moelpr.megatron_patches.megatron_fixes import GroupStepAdam
    from tests.fake_gpu.fake_cuda import DEVICE, HostSyncs

    with FakeTensorMode():
        parameters = [torch.nn.Parameter(torch.empty(8, device=DEVICE)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        with HostSyncs(number=1) as syncs:
            GroupStepAdam(parameters, lr=1e-3).step()
    return {"outside": syncs.places}


if __name__ == "__main__":
    main()
