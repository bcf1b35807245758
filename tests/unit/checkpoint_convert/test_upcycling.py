"""How new experts start: as copies, as copies with noise, or partly drawn anew."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_convert.megatron_folder import MegatronReader
from checkpoint_convert.upcycling import Start, hf_to_mcore
from moelpr.errors import UserError
from moelpr.stages import Part

MLP = "model.layers.2.mlp."


def upcycled(qwen2: Path, folder: Path, start: Start) -> MegatronReader:
    hf_to_mcore(qwen2, folder, num_new_experts=3, start=start)
    return MegatronReader(folder)


def expert(model: MegatronReader, number: int) -> dict[str, Tensor]:
    """Gate, up and down of an expert, an FFN dimension a row: [ffn, hidden]."""
    gate, up, down = (model.read(f"{MLP}experts.{number}.{name}_proj.weight") for name in ("gate", "up", "down"))
    return {"gate": gate, "up": up, "down": down.T}


def changed_rows(before: Tensor, after: Tensor) -> set[int]:
    return set((before != after).any(dim=1).nonzero().flatten().tolist())


def test_nothing_but_new_experts_is_changed(qwen2: Path, tmp_path: Path) -> None:
    copied = upcycled(qwen2, tmp_path / "copied", Start())
    for name, start in {"noise": Start(noise=0.1), "drop": Start(reinitialise=0.5), "seed": Start(seed=7)}.items():
        other = upcycled(qwen2, tmp_path / name, start)
        for piece in copied.pieces:
            same = torch.equal(copied.read_piece(piece), other.read_piece(piece))
            assert same == (piece.part is not {"seed": Part.ROUTER}.get(name, Part.NEW_EXPERTS)), (name, piece)


def test_noise_is_a_share_of_the_weights_deviation(qwen2: Path, tmp_path: Path) -> None:
    model = upcycled(qwen2, tmp_path / "out", Start(noise=0.25))
    original = expert(model, 0)
    noises = [{name: expert(model, j)[name] - original[name] for name in original} for j in (1, 2, 3)]
    gate_and_up = torch.cat([original["gate"], original["up"]])
    for noise in noises:
        assert torch.cat([noise["gate"], noise["up"]]).std().item() == pytest.approx(
            0.25 * gate_and_up.std().item(), rel=0.1
        )
        assert noise["down"].std().item() == pytest.approx(0.25 * original["down"].std().item(), rel=0.1)
    assert not torch.equal(noises[0]["up"], noises[1]["up"])


def test_a_share_of_the_ffn_is_drawn_anew_the_same_for_gate_up_and_down(qwen2: Path, tmp_path: Path) -> None:
    model = upcycled(qwen2, tmp_path / "out", Start(reinitialise=0.5))
    original = expert(model, 0)
    dropped = []
    for j in (1, 2, 3):
        new = expert(model, j)
        rows = {name: changed_rows(original[name], new[name]) for name in original}
        assert rows["gate"] == rows["up"] == rows["down"]
        assert len(rows["gate"]) == 24  # half of 48
        dropped.append(rows["gate"])
        for name in original:
            index = sorted(rows[name])
            before, after = original[name][index], new[name][index]
            deviation = before.std().item()
            assert after.std().item() == pytest.approx(deviation, rel=0.15)
            assert after.mean().item() == pytest.approx(before.mean().item(), abs=4 * deviation / before.numel() ** 0.5)
    assert dropped[0] != dropped[1] != dropped[2]


def test_the_seed_decides_every_draw(qwen2: Path, tmp_path: Path) -> None:
    start = Start(noise=0.1, reinitialise=0.3)
    first = upcycled(qwen2, tmp_path / "first", start)
    again = upcycled(qwen2, tmp_path / "again", start)
    other = upcycled(qwen2, tmp_path / "other", Start(noise=0.1, reinitialise=0.3, seed=7))
    for name, tensor in expert(first, 2).items():
        assert torch.equal(tensor, expert(again, 2)[name])
        assert not torch.equal(tensor, expert(other, 2)[name])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (Start(noise=-0.1), "--expert-noise .*-0.1"),
        (Start(noise=float("nan")), "--expert-noise .*nan"),
        (Start(reinitialise=1.5), "--reinitialise .*0 and 1.* 1.5"),
        (Start("random", noise=0.1), "--new-experts random.*--expert-noise"),
    ],
)
def test_impossible_starts(qwen2: Path, tmp_path: Path, start: Start, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf_to_mcore(qwen2, tmp_path / "out", start=start)
    assert not list(tmp_path.iterdir())
