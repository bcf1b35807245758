"""Both readers of one model, transformers and the trainer's own code, give equal numbers."""

from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from checkpoint_convert.export import mcore_to_hf
from checkpoint_convert.upcycling import Start, hf_to_mcore
from moelpr.errors import UserError
from moelpr.evaluate.compare import compare_models
from moelpr.evaluate.models import open_model
from moelpr.evaluate.perplexity import Settings

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, dense_dir: Path) -> dict[str, Path]:
    """The dense model and one upcycled in a first and in a second round, as Megatron's and as transformers' each."""
    folder = tmp_path_factory.mktemp("both")
    hf_to_mcore(dense_dir, folder / "dense", num_new_experts=None)
    hf_to_mcore(dense_dir, folder / "moe", num_new_experts=3, moe_layers=[0, 2], start=Start(noise=0.5))
    mcore_to_hf(folder / "moe", folder / "moe-hf")
    hf_to_mcore(folder / "moe-hf", folder / "second", num_new_experts=2, start=Start(noise=0.5))
    mcore_to_hf(folder / "second", folder / "second-hf")
    return {
        "dense": folder / "dense", "dense-hf": dense_dir, "moe": folder / "moe", "moe-hf": folder / "moe-hf",
        "second": folder / "second", "second-hf": folder / "second-hf",
    }  # fmt: skip


def test_a_checkpoint_and_its_export_score_and_route_alike(both, texts):
    results = compare_models(both, texts, Settings(16, 4))
    for name in ("dense", "moe", "second"):
        for language in texts:
            ours, theirs = results[name].scores[language], results[f"{name}-hf"].scores[language]
            assert ours.document_bits == pytest.approx(theirs.document_bits, rel=1e-5)
            assert ours.document_correct == theirs.document_correct
            assert ours.document_tokens == theirs.document_tokens
            if name == "dense":
                assert ours.routing is theirs.routing is None
            else:
                assert ours.routing.layers == theirs.routing.layers == [0, 2]
                for found, wanted in zip(astuple(ours.routing), astuple(theirs.routing), strict=True):
                    found, wanted = torch.tensor(found).double(), torch.tensor(wanted).double()
                    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert results["second-hf"].scores["en"].routing.num_original_experts == 4
    assert results["dense"].bits_per_byte != pytest.approx(results["moe"].bits_per_byte, rel=1e-3)


def test_a_checkpoint_in_bfloat16_is_close_to_its_export_in_bfloat16(both, texts):
    results = compare_models({name: both[name] for name in ("moe", "moe-hf")}, texts, Settings(16, 4), dtype="bfloat16")
    for language in texts:
        assert results["moe"].bits_per_byte[language] == pytest.approx(
            results["moe-hf"].bits_per_byte[language], rel=0.02
        )


def test_a_checkpoint_without_a_tokenizer_is_refused(both, tmp_path):
    for file in both["dense"].iterdir():
        if file.name != "hf":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UserError, match="tokenizer in .* cannot be opened"), open_model(tmp_path):
        pass
