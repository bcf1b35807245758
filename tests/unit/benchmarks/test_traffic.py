import pytest
import torch

from benchmarks.traffic import Traffic, bytes_to_others, counted_traffic


def test_rows_for_the_own_rank_do_not_count() -> None:
    rows = torch.zeros(10, 3)  # 12 bytes a row
    assert bytes_to_others(rows, [2, 5, 3], own_rank=1, num_ranks=3) == 5 * 12
    assert bytes_to_others(rows, None, own_rank=0, num_ranks=5) == 8 * 12  # equal shares of 2 rows
    assert bytes_to_others(rows[:, 0].bfloat16(), [4, 6], own_rank=0, num_ranks=2) == 6 * 2
    assert bytes_to_others(rows[:0], [0, 0], own_rank=0, num_ranks=2) == 0


def test_the_counter_separates_phases_and_finds_the_busier_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with counted_traffic() as traffic:
        torch.distributed.all_to_all_single(torch.zeros(7, 2), torch.zeros(4, 2), [3, 4], [3, 1], group=None)
        traffic.phase = "backward"
        torch.distributed.all_to_all_single(torch.zeros(4, 2), torch.zeros(7, 2), [3, 1], [3, 4], group=None)
    assert traffic == Traffic([("forward", 1 * 8, 4 * 8), ("backward", 4 * 8, 1 * 8)], phase="backward")
    assert (traffic.sent("forward"), traffic.sent("backward"), traffic.sent()) == (8, 32, 40)
    assert traffic.busier_directions() == [32, 32]
    torch.distributed.all_to_all_single(torch.zeros(1, 2), torch.zeros(1, 2), [0, 1], [0, 1], group=None)
    assert len(traffic.calls) == 2 and len(calls) == 3, "after the context, calls are not counted but still made"
