"""What new tokens add to the time of a stage-1 step, at equal numbers of tokens; the limit is 3%.

    python -m benchmarks.new_rows [--json FILE]

The model is Qwen1.5-1.8B with 8,000 new tokens, with a quarter of its layers, width and vocabulary (so that the output
layer has its real share of the work), on one micro-batch. Contenders take turns in every round; ratios are medians of
the rounds' ratios. `stage 0` is reported without a limit: without new tokens there is no such stage.
"""

import torch

from benchmarks.common import add_json, argument_parser, install_megatron, print_table, write_json
from benchmarks.routing import impose
from benchmarks.timing import median_s, take_turns, time_ratio
from moelpr.process.command import run_command

LIMIT = 1.03
NEW_SHARE = 8000 / 151_936  # of the old vocabulary


def main() -> None:
    parser = argument_parser(
        __doc__, layers=6, hidden=512, ffn=1376, head=128, vocabulary=9496, sequences=8, length=256, rounds=9,
        new_experts=5, topk=2, original_copies=2,
    )  # fmt: skip
    add_json(parser)
    args = parser.parse_args()
    install_megatron()
    from benchmarks.steps import DEVICE, our_step, random_batch, spec_of
    from moelpr.megatron_patches.bootstrap import single_process

    with single_process():
        base = spec_of(args)
        grown = base.with_new_tokens(args.vocabulary, round(NEW_SHARE * args.vocabulary))
        batch, grown_batch = (random_batch(spec, args.sequences) for spec in (base, grown))
        steps = {
            "stage 1": our_step(base, "stage1", batch),
            "stage 1, new tokens": our_step(grown, "stage1", grown_batch),
            "stage 1, new tokens that train": our_step(grown, "stage1", grown_batch, train_new_embeddings=True),
            "stage 0": our_step(grown, "stage0", grown_batch),
        }
        for layer in range(args.layers):  # the same work for all
            places = torch.rand(batch["tokens"].numel(), args.new_experts + args.original_copies)
            for step in steps.values():
                impose(step.routers[layer], places.topk(args.topk).indices.to(DEVICE))
        wall, cpu = take_turns(steps, args.rounds)
    rows = [
        {
            "step": name,
            "step_time_s": seconds,
            "ratio": time_ratio(wall, name, "stage 1"),
            "ratio by CPU time": time_ratio(cpu, name, "stage 1"),
            "at most": LIMIT if "new" in name else "",
        }
        for name, seconds in median_s(wall).items()
    ]
    print_table(rows)
    write_json(
        {"new_tokens": round(NEW_SHARE * args.vocabulary), "rows": rows, "times_s": wall, "cpu_times_s": cpu}, args.json
    )


if __name__ == "__main__":
    run_command(main)
