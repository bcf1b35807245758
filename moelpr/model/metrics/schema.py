"""The table of metrics: all that is known of the numbers that each training step logs, one entry per metric.

The trainer's log, TensorBoard, the report and the examples take keys, titles and places from here. To
add a metric, add an entry, compute it in `moelpr/train/step_log.py`, and explain it in docs/method.md.
"""

from dataclasses import dataclass
from typing import Any, Self

# Code of a group of languages -> its name.
GROUP_NAMES = {"original": "original languages", "expanded": "expanded languages"}
# Fractions of tokens, per group in training and per language in evaluations -> what these tokens have in common.
ROUTING_SHARES = {
    "original_first_share": "first choice is an original expert",
    "all_original_share": "choices are all original experts",
}


@dataclass(frozen=True, eq=False)  # equal to its key
class Metric(str):
    """A metric: its key in metrics.jsonl, and what readers need to know of it."""

    key: str  # equal to the metric
    name: str  # metrics of the same name share a chart
    unit: str = ""  # unless the name has it
    # a short name for the trainer's progress line and the report's table of curves; "" if they do not show the metric
    label: str = ""
    group: str = ""  # group of languages whose tokens are measured; "" for all tokens
    axes: str = ""  # "" for one number per step, "L" for one per MoE layer, "LE" for one per MoE layer and expert
    tag: str = ""  # the TensorBoard tag, with a place for each axis; "" if it is Megatron's, or there is none
    in_chart: bool = True  # whether the report draws it
    tracked: str = ""  # its name in trackers, Megatron's if there is one; they get means over MoE layers; "": not there
    is_fraction: bool = False  # whether charts show it as a percentage
    is_noisy: bool = True  # whether charts show its running mean

    def __new__(cls, key: str, *_: Any, **__: Any) -> Self:
        return super().__new__(cls, key)

    @property
    def heading(self) -> str:
        """The name with the unit in parentheses."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


# Readers show metrics in this order.
METRICS = (
    LM_LOSS := Metric("lm_loss", "next-token loss", "nats per token", "loss", tracked="lm loss"),
    *(
        Metric(f"lm_loss_{g}", "next-token loss", "nats per token", group=g, tracked=f"lm loss {g}")
        for g in GROUP_NAMES
    ),
    BALANCE_LOSS := Metric("balance_loss", "balance loss", label="balance", tracked="load_balancing_loss"),
    LPR_LOSS := Metric("lpr_loss", "LPR loss", "nats", "LPR", tag="lpr loss", tracked="lpr loss"),
    *(
        Metric(
            f"{share}_{group}",
            f"tokens whose {title}",
            group=group,
            axes="L",
            tag=f"{share}_{group}/moe layer {{}}",
            is_fraction=True,
            tracked=f"{share}_{group}" if share == "original_first_share" else "",
        )
        for share, title in ROUTING_SHARES.items()
        for group in GROUP_NAMES
    ),
    GRAD_NORM := Metric("grad_norm", "gradient norm", tracked="grad-norm"),
    LEARNING_RATE := Metric("learning_rate", "learning rate", tracked="learning-rate", is_noisy=False),
    TOKENS_PER_S := Metric("tokens_per_s", "tokens per second", label="tokens/s", tracked="tokens_per_s"),
    PEAK_MEMORY_GIB := Metric("peak_memory_gib", "memory", "GiB", tracked="peak_memory_gib", in_chart=False),
    STEP_TIME_S := Metric("step_time_s", "time of a step", "s", in_chart=False),
    *(
        Metric(f"forward_time_s_{of}", "ranks' forward passes", "s", tracked=f"forward_time_s_{of}", in_chart=False)
        for of in ("min", "mean", "max")
    ),
    CONSUMED_TOKENS := Metric("consumed_tokens", "trained tokens", tracked="consumed_tokens", in_chart=False),
    ROUTER_SCORE := Metric(
        "router_score", "router score", axes="LE", tag="router score, moe layer {}/expert {}", in_chart=False
    ),
    TOKEN_SHARE := Metric(
        "token_share", "token share", axes="LE", tag="token share, moe layer {}/expert {}", in_chart=False
    ),
)
# Metrics of one group of languages: `LM_LOSS_OF["original"]`.
LM_LOSS_OF = {metric.group: metric for metric in METRICS if metric.name == LM_LOSS.name}
