import pytest

from moelpr.base import ranks
from tests.support.ranks import as_ranks


def test_a_command_is_the_first_and_last_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "_is_initialized", lambda: False)
    assert (ranks.rank(), ranks.local_rank(), ranks.world_size()) == (0, 0, 1)
    assert ranks.is_first_rank() and ranks.is_last_rank()
    assert ranks.own_share([1, 2]) == [1, 2] and ranks.gather("a") == ["a"]


def test_the_launcher_says_the_rank_before_torch_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is not divided then: nobody could gather it."""
    monkeypatch.setattr(ranks, "_is_initialized", lambda: False)  # earlier tests of this process may have
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (ranks.rank(), ranks.world_size()) == (2, 3) and ranks.is_last_rank() and not ranks.is_first_rank()
    assert ranks.own_share([1, 2]) == [1, 2] and ranks.gather("a") == ["a"]


def test_ranks_divide_work_and_gather_it(monkeypatch: pytest.MonkeyPatch) -> None:
    results = as_ranks(monkeypatch, 3, lambda: ranks.gather((ranks.rank(), ranks.own_share("abcd"))))
    assert results == [[(0, "ad"), (1, "b"), (2, "c")]] * 3
