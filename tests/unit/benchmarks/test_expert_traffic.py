import pytest
import torch

from benchmarks.expert_traffic import bytes_to_others, counted_bytes, nearest_multiple


@pytest.mark.parametrize(("experts", "ep", "multiple"), [(10, 2, 10), (10, 4, 8), (9, 4, 8), (4, 4, 4), (11, 4, 12)])
def test_the_peer_has_the_nearest_number_of_experts_that_ep_divides(experts: int, ep: int, multiple: int) -> None:
    assert nearest_multiple(experts, ep) == multiple


def test_rows_for_the_own_rank_do_not_count() -> None:
    rows = torch.zeros(10, 3)  # 12 bytes a row
    assert bytes_to_others(rows, [2, 5, 3], own_rank=1, num_ranks=3) == 5 * 12
    assert bytes_to_others(rows, None, own_rank=0, num_ranks=5) == 8 * 12  # equal shares of 2 rows
    assert bytes_to_others(rows[:, 0].bfloat16(), [4, 6], own_rank=0, num_ranks=2) == 6 * 2
    assert bytes_to_others(rows[:0], [0, 0], own_rank=0, num_ranks=2) == 0


def test_all_to_alls_are_counted_inside_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    arguments = torch.zeros(7, 2), torch.zeros(4, 2), [3, 4], [3, 1]
    with counted_bytes() as sent:
        torch.distributed.all_to_all_single(*arguments, group=None)
    torch.distributed.all_to_all_single(*arguments, group=None)
    assert sent == [1 * 8] and len(calls) == 2
