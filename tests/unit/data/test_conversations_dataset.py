"""Samples of conversations: whole ones, apart from each other, and only the assistant's tokens count."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.corpus.corpus_writer import CorpusWriter
from data_tools.corpus.tokenized import Documents, joined_runs, runs_of
from moelpr.base.errors import UserError
from moelpr.data.dataset import corpus_table
from tests.support.gpt_data import gpt_config, training_set

LENGTH = 24


@pytest.fixture
def conversations(tmp_path: Path) -> tuple[Path, dict[tuple[int, ...], tuple[list[int], bool]]]:
    """A corpus, and for each conversation, by its tokens, which of them count and its language bit."""
    random, known = np.random.default_rng(5), {}
    with CorpusWriter(tmp_path / "chat", 500, has_conversations=True) as writer:
        for _ in range(50):
            length = int(random.integers(2, LENGTH + 1))
            ids, counts = random.integers(1, 500, length), random.integers(0, 2, length).astype(np.uint8)
            counts[0], bit = 0, bool(random.integers(2))
            runs = joined_runs(np.array([bit], np.uint8), np.array([length]))
            writer.add(Documents(ids.astype(np.uint16), np.array([length]), runs, loss_runs=runs_of(counts)))
            known[tuple(ids.tolist())] = counts.tolist(), bit
        writer.finalize()
        writer.commit()
    return tmp_path / "chat", known


@pytest.mark.parametrize("is_packed", [True, False])
def test_an_epoch_has_every_conversation_once_and_whole_and_its_loss_where_it_counts(conversations, is_packed) -> None:
    prefix, known = conversations
    config = gpt_config([str(prefix)], sequence_length=LENGTH, inter_document_masking=is_packed)
    windows = len(training_set(1, config))
    assert windows < 50 if is_packed else windows == 50
    dataset = training_set(windows + 1, config)
    assert len(dataset) == 2 * windows
    table = corpus_table(dataset, windows)
    assert f"{windows:,}" in table and table.endswith(" 1.00")
    for epoch in (0, 1):
        seen = []
        for index in range(epoch * windows, (epoch + 1) * windows):
            seen += check_window(dataset[index], known, is_packed)
        assert sorted(seen) == sorted(known)


def check_window(sample: dict[str, Any], known: dict, is_packed: bool) -> list[tuple[int, ...]]:
    """Compare a sample with the conversations in it, which are returned."""
    tokens, labels, mask = (sample[name].tolist() for name in ("tokens", "labels", "loss_mask"))
    bits, seen, start = sample["is_original"].tolist(), [], 0
    while start < LENGTH:
        actual = next((one for one in known if tuple(tokens[start : start + len(one)]) == one), None)
        if actual is None or actual in seen:
            break
        counts, bit = known[actual]
        stop = start + len(actual)
        assert mask[start:stop] == [*counts[1:], 0] and bits[start:stop] == [bit] * len(actual)
        assert labels[start : stop - 1] == list(actual[1:])
        if is_packed:
            assert sample["position_ids"][start:stop].tolist() == list(range(len(actual)))
        seen.append(actual)
        start = stop
        if not is_packed:
            break
    assert seen and not any(mask[start:]) and not any(bits[start:])
    assert set(tokens[start:]) <= {token for one in seen for token in one}  # no padding reaches the routers
    if is_packed and start < LENGTH:
        assert sample["position_ids"][start] == 0
    return seen


def test_the_order_does_not_depend_on_the_length_of_the_run_and_a_longer_conversation_is_refused(conversations) -> None:
    prefix, _ = conversations
    settings = {"sequence_length": LENGTH, "inter_document_masking": True}
    short, long = (training_set(number, gpt_config([str(prefix)], **settings)) for number in (3, 200))
    for index in range(3):
        assert torch.equal(short[index]["tokens"], long[index]["tokens"])
    with pytest.raises(UserError, match="more than 20 tokens"):
        training_set(3, gpt_config([str(prefix)], **settings | {"sequence_length": 20}))


def test_conversations_blend_with_text(conversations, write_corpus: Callable) -> None:
    """Text in the same run counts everywhere, and no window has both."""
    prefix, known = conversations
    text, *_ = write_corpus("text")
    config = gpt_config([str(prefix), str(text)], [1.0, 1.0], sequence_length=LENGTH, inter_document_masking=True)
    dataset = training_set(40, config)
    kinds = [bool(dataset[index]["loss_mask"].all()) for index in range(40)]
    assert 15 <= sum(kinds) <= 25
    for index, is_text in enumerate(kinds):
        if not is_text:
            check_window(dataset[index], known, True)
