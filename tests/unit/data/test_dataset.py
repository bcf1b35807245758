"""The language bit stays with its token through Megatron's packing, shuffling, blending and pickling."""

import argparse
import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from benchmarks import common
from moelpr.base.errors import UserError
from moelpr.base.quantities import format_count
from moelpr.model.megatron import bootstrap

bootstrap.install_patches()

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402

from moelpr.data import dataset as datasets  # noqa: E402
from moelpr.data.dataset import TaggedGPTDataset, TaggedIndexedDataset, build_datasets  # noqa: E402
from tests.support.gpt_data import gpt_config, training_set  # noqa: E402


def build(kind: type, *prefixes: Path, vocab: int = 500, samples: int = 30):  # noqa: ANN201
    return training_set(samples, gpt_config([*map(str, prefixes)], [1.0] * len(prefixes), vocab), kind)


@pytest.mark.parametrize("mmap", [True, False])
def test_sequences_are_megatrons_and_their_ranges_are_recorded(write_corpus: Callable, mmap: bool) -> None:
    prefix, tokens, _ = write_corpus("corpus")
    dataset, plain = TaggedIndexedDataset(str(prefix), mmap=mmap), IndexedDataset(str(prefix))
    for document in range(len(dataset)):
        assert np.array_equal(dataset.get(document), plain.get(document))
    assert dataset.edges[:1] == [0] and dataset.edges[1::2] == [*dataset.edges[2::2], len(tokens)]
    dataset.edges.clear()
    part = dataset.get(5, offset=1, length=np.int32(2))
    assert np.array_equal(part, plain.get(5, offset=1, length=2))
    start, stop = dataset.edges
    assert np.array_equal(tokens[start:stop], part)


def test_samples_are_megatrons_with_the_right_bit_for_every_token(write_corpus: Callable) -> None:
    """Every token of a corpus has its own id, so that a sample says where it came from."""
    prefix, _, is_original = write_corpus("corpus")
    # renumber the tokens 0, 1, 2, … in place
    total = len(is_original)
    np.arange(total, dtype=np.uint16).tofile(f"{prefix}.bin")
    ours, megatrons = (build(kind, prefix, vocab=total) for kind in (TaggedGPTDataset, GPTDataset))
    for index in range(len(ours)):
        sample, wanted = ours[index], megatrons[index]
        assert all(torch.equal(sample[key], wanted[key]) for key in ("tokens", "labels", "loss_mask", "position_ids"))
        for bits, ids in (("is_original", "tokens"), ("is_original_label", "labels")):
            assert np.array_equal(sample[bits].numpy().astype(bool), is_original[sample[ids].numpy()])


def test_a_blend_keeps_each_corpus_bits(write_corpus: Callable) -> None:
    original, *_ = write_corpus("original", bits="original", seed=1)
    expanded, *_ = write_corpus("expanded", bits="expanded", seed=2)
    blend = build(TaggedGPTDataset, original, expanded, samples=20)
    shares = [blend[index]["is_original"].float().mean().item() for index in range(20)]
    assert sorted(set(shares)) == [0.0, 1.0]


def test_dataset_can_be_pickled_for_loader_workers(write_corpus: Callable) -> None:
    prefix, *_ = write_corpus("corpus")
    dataset = TaggedIndexedDataset(str(prefix))
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again.get(3), dataset.get(3))


@pytest.mark.parametrize(
    ("name", "vocab", "message"),
    [
        ("without", 500, r"without.lang .*No such file.*moelpr data preprocess"),
        ("foreign", 500, r"foreign.lang covers .* tokens"),
        ("corpus", 400, r"corpus.bin contains token ID \d+, .* 400 entries"),
        ("nowhere", 500, r"nowhere.bin and .*nowhere.idx are missing; "),
        ("empty", 500, r"empty.bin contains no tokens"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_named(name, vocab, message, write_corpus, tmp_path) -> None:
    for other in ("corpus", "without", "foreign"):
        write_corpus(other, documents=41 if other == "foreign" else 40)
    (tmp_path / "without.lang").replace(tmp_path / "foreign.lang")
    common.write_corpus(tmp_path / "empty", 500, [([], True)])
    with pytest.raises(UserError, match=message):
        dataset = build(TaggedGPTDataset, tmp_path / name, vocab=vocab)
        for index in range(len(dataset)):
            dataset[index]


def test_a_corpus_made_again_is_not_read_in_the_order_of_the_old_one(write_corpus: Callable, tmp_path: Path) -> None:
    """Megatron caches the order by name, number of samples and settings."""

    def order(documents: int) -> list[int]:
        for path in tmp_path.glob("corpus.*"):
            path.unlink()
        prefix, *_ = write_corpus("corpus", documents=documents)
        ids = datasets.TokenIds(500, unique_identifiers=datasets.index_checksums([str(prefix)]))
        config = gpt_config([str(prefix)], path_to_cache=str(tmp_path / "cache"), tokenizer=ids)
        return [*training_set(30, config).document_index]

    assert max(order(40)) == 39
    num_caches = len(list((tmp_path / "cache").iterdir()))
    assert max(order(40)) == 39 and len(list((tmp_path / "cache").iterdir())) == num_caches
    assert max(order(60)) == 59
    (tmp_path / "corpus.manifest.json").unlink(missing_ok=True)
    without, nowhere = (datasets.index_checksums([str(tmp_path / name)]) for name in ("corpus", "nowhere"))
    assert without != nowhere == {}


def test_the_table_of_corpora_has_shares_epochs_and_the_part_of_original_languages(write_corpus: Callable) -> None:
    original, ids, _ = write_corpus("original", documents=30, bits="original", seed=1)
    mixed, mixed_ids, bits = write_corpus("mixed", documents=50, seed=2)
    train = training_set(200, gpt_config([str(original), str(mixed)], [3.0, 1.0]))
    first, _, *rows = datasets.corpus_table(train, 200).splitlines()
    assert f"{0.75 + 0.25 * bits.mean():.1%} are original-language" in first and "200 samples of 16" in first
    assert rows[0].split() == [str(original), format_count(len(ids)), "75.0%", f"{150 * 16 / len(ids):.2f}"]
    assert rows[1].split() == [str(mixed), format_count(len(mixed_ids)), "25.0%", f"{50 * 16 / len(mixed_ids):.2f}"]


def test_a_run_longer_than_corpora_without_weights_is_refused(write_corpus: Callable) -> None:
    prefixes = [str(write_corpus(name, seed=seed)[0]) for seed, name in enumerate("ab")]
    with pytest.raises(UserError, match=r"\d+ samples, .* 5,000; .*--data-path"):
        datasets.corpus_table(training_set(5000, gpt_config(prefixes)), 5000)
    assert datasets.corpus_table(training_set(5000, gpt_config(prefixes, [1.0, 1.0])), 5000)


def test_padding_of_the_first_window_that_is_read_is_masked_in_no_other(write_corpus: Callable, tmp_path: Path) -> None:
    """Megatron caches the loss mask of the first one."""
    prefix, tokens, _ = write_corpus("corpus", bits="original", documents=1)
    [dataset] = build(TaggedGPTDataset, prefix, samples=1).datasets
    dataset.config.sequence_length = len(tokens) // 2 + 2
    dataset.shuffle_index, dataset.document_index = [0, 1], [0]
    dataset.sample_index = np.array([[0, 0], [0, dataset.config.sequence_length], [0, len(tokens) - 1]])
    padded, whole, again = dataset[1], dataset[0], dataset[1]
    assert whole["loss_mask"].all()
    assert not padded["loss_mask"].all() and torch.equal(padded["loss_mask"], again["loss_mask"])


@pytest.mark.parametrize(
    ("eos", "manifests"), [(7, ()), ([7, 9], ()), (9, (7,)), (None, (7,)), (None, ()), (7, (7, 8)), (7, (-7,))]
)
def test_the_loss_of_the_end_of_document_is_masked_if_wanted(write_corpus, tmp_path, monkeypatch, eos, manifests):
    """`manifests`: the end-of-document token of each corpus, negative if its documents do not end with it."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": eos}))
    prefix, *_ = write_corpus("corpus", vocab=10)
    corpora = [str(prefix), *(str(write_corpus(f"corpus{number}", vocab=10)[0]) for number in manifests[1:])]
    records = {
        path: SimpleNamespace(append_eod=eod > 0, tokenizer=SimpleNamespace(eod_id=abs(eod)), files={})
        for path, eod in zip(corpora, manifests, strict=False)
    }
    monkeypatch.setattr("moelpr.data.dataset.Manifest.read", lambda path: records.get(str(path)))
    settings = {"seed": 3, "seq_length": 16, "data_path": corpora, "split": "100,0,0", "model_source": tmp_path}
    settings |= {"vocab_size": 10, "mid_level_dataset_surplus": 0.005, "num_dataset_builder_threads": 1}
    settings |= {"data_cache_path": None, "dataloader_inter_document_masking": False}
    args = argparse.Namespace(**settings, eod_mask_loss=True, mmap_bin_files=True)
    if manifests in ((7, 8), (-7,)) or (eos is None and not manifests):
        with pytest.raises(UserError, match="--eod-mask-loss requires (an|one) end-of-document token"):
            datasets.dataset_config(args)
        return
    train, *_ = build_datasets([20, 0, 0], datasets.dataset_config(args))
    samples = [train[number] for number in range(20)]
    assert all(torch.equal(sample["loss_mask"] == 0, sample["tokens"] == 7) for sample in samples)
    assert any((sample["tokens"] == 7).any() for sample in samples)


def test_a_cache_that_cannot_be_written_is_reported_with_the_flag(write_corpus, monkeypatch) -> None:
    """Megatron raises a bare Exception, from the error that tells which file it was. Root may write everywhere."""
    prefix, *_ = write_corpus("corpus")
    config = build(TaggedGPTDataset, prefix).config

    for number, kind, message in (
        (errno.EACCES, UserError, "/shared/cache/x.npy .*Permission denied.*--data-cache-path"),
        (errno.EROFS, UserError, "/shared/cache/x.npy .*Read-only.*--data-cache-path"),
        (errno.ENOSPC, OSError, "No space left"),
        (errno.EIO, Exception, "Failed to write"),
    ):
        error = Exception("Failed to write")
        error.__cause__ = OSError(number, os.strerror(number), "/shared/cache/x.npy")
        monkeypatch.setattr(BlendedMegatronDatasetBuilder, "build", Mock(side_effect=error))
        with pytest.raises(kind, match=message):
            build_datasets([30, 0, 0], config)
