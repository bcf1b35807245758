from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import common
from moelpr.train.arguments.flags import all_arguments
from moelpr.train.arguments.length import set_train_iters, set_weights
from moelpr.train.arguments.requested import RequestedRun
from tests.support import manifests
from tests.support.gpt_data import gpt_config, training_set

BATCH, SEQUENCE = 4, 16
STEP = f"--stage stage1 --micro-batch-size 2 --global-batch-size {BATCH} --seq-length {SEQUENCE} --lr 1e-3".split()

Resolve = Callable[..., tuple[int | None, str, list[str]]]


def write_corpus(prefix: Path, tokens: int) -> str:
    lengths = (min(7, tokens - start) for start in range(0, tokens, 7))
    return str(common.write_corpus(prefix, 100, ((range(length), True) for length in lengths)))


def write_manifest(prefix: Path, tokens: int) -> str:
    """A corpus of which only the manifest can be read."""
    manifests.write_manifest(prefix, tokens)
    for suffix in ("bin", "idx"):
        Path(f"{prefix}.{suffix}").touch()
    return str(prefix)


@pytest.fixture
def resolved(upcycled: str) -> Resolve:
    """The steps of a run, what it prints about them, and its problems."""

    def resolve(*argv: str) -> tuple[int | None, str, list[str]]:
        run = RequestedRun.gather(["--pretrained-checkpoint", upcycled, *STEP, *argv], all_arguments())
        line = set_train_iters(run)
        return run.args.train_iters, line, run.problems

    return resolve


@pytest.mark.parametrize(
    ("tokens", "steps"), [("64", 1), ("65", 2), ("640", 10), ("1.5K", 24), ("6.4e3", 100), ("1_280", 20)]
)
def test_tokens_are_rounded_up_to_whole_steps_of_64(resolved: Resolve, tokens: str, steps: int) -> None:
    assert resolved("--train-tokens", tokens)[0] == steps


def test_epochs_of_one_corpus_are_as_many_samples_as_megatron_makes_of_them(resolved: Resolve, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", 1001)
    for epochs in (2, 2.5):
        steps, _, _ = resolved("--data-path", prefix, "--train-epochs", str(epochs))
        assert steps == int(epochs * 1001 - 1) // SEQUENCE // BATCH


def test_an_epoch_counts_every_corpus_once_whatever_its_weight(resolved: Resolve, tmp_path: Path) -> None:
    """The numbers come from manifests, which are read at once, or from the .idx of a corpus without one."""
    large, small = write_manifest(tmp_path / "large", 64_000_002), write_corpus(tmp_path / "small", 6401)
    for data in (["--data-path", "1", large, "9", small], ["--data-path", "5", small, "5", large]):
        steps, line, problems = resolved(*data, "--train-epochs", "0.5")
        assert (steps, problems) == ((32_000_000 // SEQUENCE + 3199 // SEQUENCE) // BATCH, [])
        assert line.startswith("0.5 epochs of 64,006,403 tokens: 500,0")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.lists(st.integers(70, 400), min_size=1, max_size=3),
    epochs=st.floats(0.5, 1) | st.sampled_from([1.0]),
    data=st.data(),
)
def test_megatron_reads_no_text_twice_in_one_epoch(resolved, tmp_path_factory, tokens, epochs, data) -> None:
    """Corpora without weights are read once, and Megatron has no more samples of them."""
    folder = tmp_path_factory.mktemp("corpora")
    prefixes = [write_corpus(folder / str(number), length) for number, length in enumerate(tokens)]
    steps, _, problems = resolved("--data-path", *prefixes, "--train-epochs", str(epochs))
    if steps is None:
        assert len(problems) == 1 and epochs * sum(tokens) < SEQUENCE * (BATCH + len(tokens))
        return
    available = len(training_set(BATCH * steps, gpt_config(prefixes)))
    assert BATCH * steps <= available
    if epochs == 1:
        assert available - BATCH * steps < BATCH  # nothing more than what fills no step is left out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--train-tokens 63", "63 tokens fill no step of 4 sequences of 16 tokens; raise --train-tokens, or lower"),
        ("--train-epochs 0 --data-path CORPUS", "0 epochs of 100 tokens fill no step"),
        ("--train-epochs 0.1 --data-path CORPUS", "0.1 epochs of 100 tokens fill no step"),
        ("--train-epochs 2 --data-path CORPUS CORPUS", "--train-epochs 2 reads text again, and several corpora"),
        ("--train-tokens 12X", "--train-tokens: expected a whole number such as 24B"),
    ],
)
def test_a_budget_that_cannot_be_spent_is_one_sentence(resolved: Resolve, tmp_path: Path, argv, message) -> None:
    corpus = write_corpus(tmp_path / "corpus", 100)
    (problem,) = resolved(*argv.replace("CORPUS", corpus).split())[2]
    assert problem.startswith(message)


def test_the_command_lines_length_takes_the_place_of_the_recipes(resolved: Resolve, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for length in ("iters: 7", "tokens: 5B", "epochs: 2", "tokens: 1.0e+9"):
        recipe.write_text(f"train-{length}\nlr: 0.1\n")
        for words, steps in ((["--train-tokens", "640"], 10), (["--train-iters=3"], 3)):
            assert resolved("--recipe", str(recipe), *words)[0] == steps
    recipe.write_text("train-tokens: 6.4e+2\n")
    assert resolved("--recipe", str(recipe))[0] == 10


@pytest.mark.parametrize("epochs", ["nan", "inf", "-1", "1e6"])
def test_epochs_are_a_positive_number(upcycled: str, problems, epochs: str) -> None:
    (actual,) = problems("stage1", upcycled, *STEP[2:], "--train-epochs", epochs, steps=False)
    assert actual.startswith("--train-epochs must be at least 0 and below 1,000,000, got")


def test_a_run_resumes_with_its_budget_and_not_with_another(make_checkpoint, problems, accepted, capsys) -> None:
    """The learning rate's schedule follows from the steps, which are recorded."""
    run = make_checkpoint("run", stage="stage1", min_lr=0.0, train_iters=10, train_tokens=640, global_batch_size=BATCH)
    final = accepted("stage1", "moved", "--save", run, *STEP[2:], "--train-tokens", "640", steps=False)
    assert (final["train_iters"], final["train_tokens"]) == (10, 640)
    assert "moelpr: 640 tokens: 10 steps of 4 sequences of 16 tokens\n" in capsys.readouterr().err
    (actual,) = problems("stage1", "moved", "--save", run, *STEP[2:], "--train-tokens", "641", steps=False)
    assert "was trained with --train-iters 10," in actual and "not --train-iters 11;" in actual


def test_a_mix_gives_weights_whose_capped_corpus_is_read_as_often_as_allowed(
    upcycled: str, tmp_path: Path, problems: Callable[..., list[str]]
) -> None:
    large, small = write_manifest(tmp_path / "large", 64_000), write_manifest(tmp_path / "small", 1_000)

    def mixed(*words: str) -> tuple[list[str], str, list[str]]:
        run = RequestedRun.gather(["--pretrained-checkpoint", upcycled, *STEP, *words], all_arguments())
        set_train_iters(run)
        table = set_weights(run)
        return run.args.data_path, table, run.problems

    data = ["--data-path", large, small, "--train-tokens", "32000"]
    assert mixed(*data, "--mix", "temperature=0.5,max-epochs=20")[0] == ["0.888889", large, "0.111111", small]
    weights, table, actual = mixed(*data, "--mix", "temperature=0,max-epochs=2")
    assert weights == ["0.9375", large, "0.0625", small] and not actual and "max_epochs" in table
    assert mixed(*data)[:2] == ([large, small], "")
    both = ["--data-path", large, small, "--train-epochs", "3"]
    assert mixed(*both, "--mix", "temperature=1")[0][1::2] == [large, small]
    for words, problem in (
        (["--data-path", "1", large, "1", small], "must have several prefixes and no weights"),
        (["--data-path", large], "must have several prefixes"),
        (["--data-path", large, write_manifest(tmp_path / "empty", 0)], "empty has no tokens to train on"),
    ):
        (actual,) = mixed(*words, "--train-tokens", "32000", "--mix", "temperature=1")[2]
        assert problem in actual
    (actual,) = mixed(*data[:3], "--train-tokens", "900K", "--mix", "temperature=1")[2]
    assert "900K tokens would read the text more often than max_epochs allows" in actual
    for wrong in ("temperature=2", "temperature=x", "heat=1", "max-epochs=3", "temperature=0.3,max-epochs=0", "0.3"):
        assert any("--mix: expected temperature=T" in actual for actual in problems("stage1", upcycled, "--mix", wrong))
