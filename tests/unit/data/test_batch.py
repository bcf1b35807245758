"""Micro-batches come in order, each with the token counts of its step."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core import parallel_state

from moelpr.data.batch import BatchReader, GlobalCounts, slice_for_context_parallel
from moelpr.train.forward_step import lpr_token_weight, next_token_loss

pytestmark = pytest.mark.usefixtures("megatron")


def samples(*originals: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches [1, 4] with so many original-language tokens; the tokens are the micro-batch's number."""
    for number, original in enumerate(originals):
        row, place = torch.full((1, 4), number), torch.arange(4)[None]
        bits = dict.fromkeys(("is_original", "is_original_label"), (place < original).long())
        yield {"tokens": row, "labels": row + 1, "loss_mask": (place < 3).float(), "position_ids": place, **bits}


def test_every_micro_batch_has_the_counts_of_its_step() -> None:
    reader, model, data = BatchReader(), torch.nn.Module(), samples(1, 3, 0, 0)
    batches = []
    for _ in range(2):
        reader.read(model, data, num_microbatches=2, shape=(1, 4))
        batches += [reader.next(model), reader.next(model)]
    assert [batch.tokens[0, 0].item() for batch in batches] == [0, 1, 2, 3]
    assert [batch.counts.original_tokens.item() for batch in batches] == [4, 4, 0, 0]
    assert [batch.counts.loss_tokens.item() for batch in batches] == [6, 6, 6, 6]
    assert batches[1].is_original.tolist() == [[True, True, True, False]]
    assert batches[0].loss_mask.dtype == torch.float32


def test_model_chunks_read_for_themselves() -> None:
    reader, first, second = BatchReader(), torch.nn.Module(), torch.nn.Module()
    for chunk in (first, second):
        reader.read(chunk, samples(1, 2), 2, (1, 4))
    read = [reader.next(first), reader.next(second), reader.next(first)]
    assert [batch.tokens[0, 0].item() for batch in read] == [0, 0, 1]


def test_the_weight_of_an_original_token_makes_the_sum_a_mean_over_the_step() -> None:
    counts = GlobalCounts(original_tokens=torch.tensor(8.0), loss_tokens=torch.tensor(64.0))
    # Megatron divides by micro-batches x data-parallel ranks (here 4 x 1) or by the step's loss tokens.
    assert lpr_token_weight(counts, num_microbatches=4, per_token_loss=False).item() == 4 / 8
    assert lpr_token_weight(counts, num_microbatches=4, per_token_loss=True).item() == 64 / 8
    none = GlobalCounts(original_tokens=torch.tensor(0.0), loss_tokens=torch.tensor(64.0))
    assert lpr_token_weight(none, num_microbatches=4, per_token_loss=False).item() == 0


def test_next_token_loss_is_reported_by_language_of_the_predicted_token() -> None:
    reader, model = BatchReader(), torch.nn.Module()
    reader.read(model, samples(2), 1, (1, 4))
    loss, num_tokens, reports = next_token_loss(reader.next(model), torch.tensor([[1.0, 2.0, 4.0, 100.0]]))
    assert loss.item() == 7.0
    assert num_tokens.item() == 3
    assert reports["lm loss original"].tolist() == [3.0, 2.0]
    assert reports["lm loss expanded"].tolist() == [4.0, 1.0]


@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_parallel_ranks_split_a_sequence_consistently(monkeypatch: pytest.MonkeyPatch, cp_size: int) -> None:
    """Rank r takes chunks r and 2 x size - 1 - r, so that causal attention is the same work for all."""
    length = 8 * cp_size
    tokens = torch.arange(2 * length).view(2, length)
    tensors = {"tokens": tokens, "labels": tokens + 1, "is_original": tokens % 3, "is_original_label": (tokens + 1) % 3}
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: cp_size)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: cp_size)
    shares = []
    for rank in range(cp_size):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        share = slice_for_context_parallel(dict(tensors))
        assert torch.equal(share["labels"], share["tokens"] + 1)
        assert torch.equal(share["is_original"], share["tokens"] % 3)
        assert torch.equal(share["is_original_label"], (share["tokens"] + 1) % 3)
        chunks = tokens.chunk(2 * cp_size, dim=1)
        assert torch.equal(share["tokens"], torch.cat([chunks[rank], chunks[2 * cp_size - 1 - rank]], dim=1))
        shares.append(share["tokens"])
    assert torch.equal(torch.cat(shares, dim=1).sort(dim=1).values, tokens)
