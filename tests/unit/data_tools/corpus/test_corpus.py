"""Mutated corpora: verification notices every change; reading ends in an error message or in data, never in a crash."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpus.corpus import Corpus
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.data.manifest import Manifest, manifest_path
from moelpr.model.megatron import bootstrap

bootstrap.install_patches()

from megatron.core.datasets.utils import Split  # noqa: E402

from moelpr.data.dataset import TaggedGPTDataset  # noqa: E402
from tests.support.gpt_data import gpt_config  # noqa: E402
from tests.support.mutations import mutated  # noqa: E402
from tests.unit.data_tools.conftest import make_corpus_in  # noqa: E402

FILES = ("bin", "idx", "lang", "manifest.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    lengths = enumerate(random.integers(0, 30, 40))
    documents = [(("en", "el", "hu")[number % 3], random.integers(0, 300, size).tolist()) for number, size in lengths]
    return make_corpus_in(tmp_path_factory.mktemp("whole"), "whole", documents)


@pytest.fixture(scope="module")
def copy(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The corpus with one file changed."""
    prefix = tmp_path_factory.mktemp("copy") / "copy"

    def copy(name: str, content: bytes) -> Path:
        for other in FILES:
            shutil.copy(f"{whole}.{other}", f"{prefix}.{other}")
        Path(f"{prefix}.{name}").write_bytes(content)
        return prefix

    return copy


@settings(deadline=5000, max_examples=150)
@given(data=st.data())
def test_every_change_of_a_corpus_is_noticed(whole: Path, copy: Callable[..., Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES[:3]))
    content = Path(f"{whole}.{name}").read_bytes()
    changed = data.draw(mutated(content))
    prefix = copy(name, changed)
    manifest = Manifest.read(prefix)
    assert manifest is not None
    if changed == content:
        assert Corpus(prefix).verify() == manifest
        manifest.verify_files(prefix, Verify.SAMPLED)
    else:
        with pytest.raises(UserError):
            Corpus(prefix).verify()
        with pytest.raises(UserError, match=rf"{prefix}\.{name} "):  # as the trainer opens it
            manifest.verify_files(prefix, Verify.SAMPLED)
    # Without a manifest some changes are as good as the truth; what is opened then can be read to its end.
    manifest_path(prefix).unlink()
    try:
        corpus = Corpus(prefix)
    except UserError:
        return
    documents = [corpus.document(index) for index in range(corpus.num_documents)]
    assert sum(len(ids) for ids, _ in documents) == sum(len(bits) for _, bits in documents) == len(corpus.tokens)


@settings(deadline=5000, max_examples=100)
@given(data=st.data())
def test_changed_manifest_is_reported_or_valid(whole: Path, copy: Callable[..., Path], data: st.DataObject) -> None:
    """It has no checksum of its own: a source's name may be changed without anyone noticing, a number may not."""
    content = Path(f"{whole}.manifest.json").read_bytes()
    prefix = copy("manifest.json", data.draw(mutated(content)))
    try:
        actual = Corpus(prefix).verify()
    except UserError:
        return
    wanted = Manifest.read(whole)
    assert actual is not None and wanted is not None
    assert (actual.documents, actual.tokens, actual.files) == (wanted.documents, wanted.tokens, wanted.files)


@settings(deadline=5000, max_examples=100)
@given(data=st.data())
def test_training_reads_a_changed_corpus_or_rejects_it(whole, copy, data) -> None:
    name = data.draw(st.sampled_from(FILES[:3]))
    prefix = copy(name, data.draw(mutated(Path(f"{whole}.{name}").read_bytes())))
    config = gpt_config([str(prefix)], vocab_size=300)
    shutil.rmtree(prefix, ignore_errors=True)  # Megatron's indices
    try:
        indexed = TaggedGPTDataset.build_low_level_dataset(str(prefix), config)
        dataset = TaggedGPTDataset(indexed, str(prefix), np.arange(len(indexed)), 20, Split.train, config)
        samples = [dataset[index] for index in range(20)]
    except UserError:
        return
    for sample in samples:
        assert all(len(sample[key]) == 16 for key in ("tokens", "labels", "is_original", "is_original_label"))
        assert 0 <= int(sample["tokens"].min()) <= int(sample["tokens"].max()) < 300
        assert int(sample["is_original"].max()) <= 1
