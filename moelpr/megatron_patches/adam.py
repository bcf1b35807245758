"""Adam with one step count per parameter group, like the fused Adams of Transformer Engine and Apex."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adam import adam


class GroupStepAdam(torch.optim.Adam):
    """torch's fused Adam(W) with the arguments of Transformer Engine's and Apex's FusedAdam.

    torch.optim.Adam keeps the step count in the state of every parameter. A rank whose distributed optimizer has no
    parameter then has no step to save, and its checkpoint can't be loaded.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, decoupled_weight_decay=adam_w_mode, capturable=capturable
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's expects a step in every parameter's state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Megatron never passes one"
        for group in self.param_groups:
            steps_before = group.get("step", 0)
            group["step"] = steps_before + 1
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            states = [self._state_of(parameter) for parameter in params]
            adam(
                params,
                [parameter.grad for parameter in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(steps_before), device=parameter.device) for parameter in params],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=group["decoupled_weight_decay"],
            )

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
