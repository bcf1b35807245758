"""Runs of language bits."""

import numpy as np

from data_tools.corpus.tokenized import joined_runs, original_tokens, run_edges, runs_of


def test_run_edges_are_the_borders_of_equal_bits() -> None:
    assert run_edges(np.array([1, 1, 0, 1, 1], np.uint8)).tolist() == [0, 2, 3, 5]
    assert run_edges(np.zeros(0, np.uint8)).tolist() == [0]


def test_runs_are_the_same_from_bits_and_from_spans() -> None:
    bits, lengths = np.array([1, 1, 0, 1], np.uint8), np.array([2, 1, 4, 3])
    runs = joined_runs(bits, lengths)
    assert runs.tolist() == runs_of(np.repeat(bits, lengths)).tolist() == [2 * 3 + 1, 2 * 4, 2 * 3 + 1]
    assert original_tokens(runs) == 6
