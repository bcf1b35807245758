"""Synthetic run folders of any length, in the format of the trainer."""

import json
import math
import random
from pathlib import Path

LANGUAGES = {"en": "original", "es": "original", "zh": "original", "el": "expanded", "hu": "expanded", "tr": "expanded"}


def make_run(
    folder: Path,
    stage: str,
    steps: int,
    num_layers: int = 4,
    languages: dict[str, str] = LANGUAGES,
    is_finished: bool = True,
    train_iters: int | None = None,
) -> Path:
    """Losses fall; stage 1 makes original languages worse, stage 2 repairs them; with noise and two warnings."""
    noise = random.Random(steps)
    folder.mkdir(parents=True)
    settings = dict(stage=stage, train_iters=train_iters or steps, lr=5e-5, seq_length=512, global_batch_size=512)
    settings |= dict(num_experts=4, num_original_experts=1, moe_router_topk=2, world_size=8)
    settings["data_path"] = ["1", "data/expanded_text_document"]
    (folder / "recipe.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    (folder / "versions.json").write_text(json.dumps({"torch": "2.15.0", "megatron-core": "0.19.2"}))
    command = {"arguments": ["--stage", stage, "--recipe", "r.yaml", "--save", "runs/a folder"], "num_ranks": 8}
    (folder / "command.json").write_text(json.dumps(command))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps + 1):
            done = step / steps
            if step:
                file.write(json.dumps(step_record(stage, step, done, num_layers, noise)) + "\n")
            if languages and (step % 100 == 0 or step == steps):
                factors = (1 + 0.06 * number for number in range(len(languages)))
                results = {name: held_out(languages[name], stage, done, next(factors)) for name in languages}
                event = {"iteration": step, "event": "validation", "stage": stage, "languages": results}
                file.write(json.dumps(event) + "\n")
        for step in (1, steps):
            event = {"iteration": step, "event": "warning", "stage": stage, "kind": "idle_expert"}
            file.write(json.dumps(event | {"message": f"expert 3 of <layer> {step} is idle"}) + "\n")
    if is_finished:
        (folder / "FINISHED").write_text(f"{steps}\n")
    return folder


def step_record(stage: str, step: int, done: float, num_layers: int, noise: random.Random) -> dict:
    loss = 2.6 + 1.2 * math.exp(-6 * done) + noise.gauss(0, 0.05)
    record = {
        "iteration": step,
        "stage": stage,
        "consumed_tokens": step * 262_144,
        "learning_rate": 5e-5 * (1 + math.cos(math.pi * done)) / 2,
        "grad_norm": 0.5 + abs(noise.gauss(0, 0.2)),
        "step_time_s": 4.0 + abs(noise.gauss(0, 0.2)),
        "tokens_per_s": 65_000 + noise.gauss(0, 900),
        "lm_loss": loss,
        "lm_loss_expanded": loss,
        "router_score": [[0.2] * 5] * num_layers,
        "token_share": [[0.4] * 5] * num_layers,
        "original_first_share_original": [None] * num_layers,
        "original_first_share_expanded": [0.2 + noise.random() / 20 for _ in range(num_layers)],
        "peak_memory_gib": 41.25,
    }
    if stage == "stage1":
        return record | {"balance_loss": 1.02 + 0.1 * math.exp(-5 * done), "lm_loss_original": None, "lpr_loss": None}
    losses = {"balance_loss": None, "lm_loss_original": loss + 0.3, "lpr_loss": 1.2 * math.exp(-3 * done) + 0.1}
    shares = [min(0.99, 0.3 + 0.6 * done + 0.02 * layer + noise.random() / 50) for layer in range(num_layers)]
    return record | losses | {"original_first_share_original": shares}


def held_out(group: str, stage: str, done: float, factor: float) -> dict:
    start, end = {
        ("original", "stage1"): (2.4, 3.0),
        ("original", "stage2"): (3.0, 2.43),
        ("expanded", "stage1"): (2.9, 2.6),
        ("expanded", "stage2"): (2.6, 2.63),
    }[group, stage]
    bits = factor * (end + (start - end) * math.exp(-5 * done) if done else start)
    return {"group": group, "lm_loss": bits * 1.2, "bits_per_byte": bits}
