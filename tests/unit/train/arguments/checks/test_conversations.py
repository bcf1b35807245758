from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.corpus_writer import CorpusWriter
from data_tools.corpus.tokenized import Documents, runs_of
from moelpr.train.arguments.flags import all_arguments
from moelpr.train.arguments.length import set_train_iters
from moelpr.train.arguments.requested import RequestedRun


@pytest.fixture
def chat(tmp_path: Path) -> str:
    """Nine conversations, of 3 to 12 tokens in original and expanded languages."""
    with CorpusWriter(tmp_path / "chat", 500, has_conversations=True) as writer:
        for length in (12, 3, 4, 5, 6, 7, 8, 9, 10):
            counts = (np.arange(length) > 1).astype(np.uint8)
            runs = np.array([length << 1 | length % 2])
            documents = Documents(np.arange(length, dtype=np.uint16), np.array([length]), runs)
            writer.add(documents._replace(loss_runs=runs_of(counts)))
        writer.finalize()
        writer.commit()
    return str(tmp_path / "chat")


def test_sft_requires_conversations_that_fit(upcycled: str, problems, data: list[str], chat: str) -> None:
    (actual,) = problems("sft", upcycled)
    assert actual.startswith("--stage sft requires conversations") and data[1] in actual
    (actual,) = problems("sft", upcycled, "--data-path", chat, "--seq-length", "11", with_data=False)
    assert "a conversation of 12 tokens, more than --seq-length 11" in actual and "--max-tokens 11" in actual


def test_sft_packs_where_attention_keeps_apart_and_weighs_tokens_alike(upcycled: str, accepted, chat: str) -> None:
    args = accepted("sft", upcycled, "--data-path", chat, with_data=False)
    assert args["dataloader_inter_document_masking"] and args["calculate_per_token_loss"]
    assert args["lpr_loss_coeff"] == 0.1 and args["balance_loss_coeff"] == 0


def test_an_epoch_is_its_windows(upcycled: str, chat: str) -> None:
    words = ["--pretrained-checkpoint", upcycled, "--stage", "sft", "--seq-length", "16", "--micro-batch-size", "1"]
    words += ["--global-batch-size", "1", "--data-path", chat, "--train-epochs", "2"]
    for flags, steps in ((["--dataloader-inter-document-masking"], 2 * 4), ([], 2 * 9)):
        run = RequestedRun.gather([*words, *flags], all_arguments())
        set_train_iters(run)
        assert run.problems == [] and run.args.train_iters == steps  # 64 tokens, of which none is lost
