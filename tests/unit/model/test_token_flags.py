import torch
from hypothesis import given
from hypothesis import strategies as st

from moelpr.model.token_flags import pack_token_flags, unpack_token_flags

bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20)


@given(bits)
def test_both_bits_come_back(pairs: list[tuple[bool, bool]]) -> None:
    is_original, is_padding = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found_original, found_padding = unpack_token_flags(pack_token_flags(is_original, is_padding))
    assert torch.equal(found_original, is_original)
    assert torch.equal(found_padding, is_padding)


def test_a_plain_padding_mask_of_megatron_has_no_language_bit() -> None:
    mask = torch.tensor([True, False])
    is_original, is_padding = unpack_token_flags(mask)
    assert not is_original.any()
    assert torch.equal(is_padding, mask)
