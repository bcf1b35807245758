import pytest
import torch

from benchmarks.expert_traffic import experts_of, nearest_multiple


@pytest.mark.parametrize(("experts", "ep", "multiple"), [(10, 2, 10), (10, 4, 8), (9, 4, 8), (4, 4, 4), (11, 4, 12)])
def test_the_peer_has_the_nearest_number_of_experts_that_ep_divides(experts: int, ep: int, multiple: int) -> None:
    assert nearest_multiple(experts, ep) == multiple


def test_places_take_turns_on_the_peers_ranks() -> None:
    """Six places and two unused experts on four ranks: [0, 4], [1, 5], [2, -], [3, -], in Megatron's order."""
    places = torch.arange(6).view(3, 2)
    assert experts_of(places, 8, 4).tolist() == [[0, 2], [4, 6], [1, 3]]
    assert experts_of(places, 6, 2).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert torch.equal(experts_of(places, 6, 1), places)
