"""Wrong words are reported one by one, with the flag that was most likely meant."""

import pytest

# Imported inside the tests: Megatron may be imported only once compat is installed (conftest.py).


def parse(*words: str) -> tuple[dict, list[str]]:
    from moelpr.arguments.flags import all_arguments

    namespace, complaints = all_arguments().parse_tolerantly(list(words))
    return vars(namespace), complaints


def test_wrong_words_leave_the_right_ones_standing() -> None:
    settings, complaints = parse(
        "--lr",
        "fast",
        "--seq-length",
        "32",
        "--lpr-loss",
        "mine",
        "--seed",
        "--no-such-thing",
        "5",
        "--stage",
        "stage1",
    )
    assert (settings["seq_length"], settings["stage"]) == (32, "stage1")
    assert [line.split(";")[0] for line in complaints] == [
        "--lr: invalid float value: 'fast'",
        "--lpr-loss: invalid choice: 'mine' (choose from paper, reference)",
        "--seed: expected one argument",
        "there is no flag --no-such-thing",
    ]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--tensor-parallel-size=2", "--tensor-model-parallel-size"),
        ("--expert-model-paralel-size", "--expert-model-parallel-size"),
        ("--balance_loss_coeff", "--balance-loss-coeff"),
        ("--lpr-los-coeff", "--lpr-loss-coeff"),
        ("--xyzzy", None),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(word: str, meant: str | None) -> None:
    (complaint,) = parse(word)[1]
    assert complaint.startswith(f"there is no flag {word.split('=')[0]}; ")
    assert ("did you mean" in complaint) == (meant is not None)
    assert meant is None or complaint.endswith(f"did you mean {meant}?")


def test_a_word_without_a_flag_is_a_mistake_too() -> None:
    assert parse("--bf16", "yes")[1] == ["yes belongs to no flag; drop it, or name its flag"]


def test_a_text_that_megatron_cannot_evaluate_is_a_complaint() -> None:
    (complaint,) = parse("--moe-layer-freq", "[1]*(")[1]
    assert complaint.startswith("--moe-layer-freq: '[1]*(' can't be read")


def test_the_source_of_a_wrong_word_is_named() -> None:
    from moelpr.arguments.flags import all_arguments

    parser = all_arguments()
    assert parser.parse_tolerantly(["--lr", "x"], where="in r.yaml, ")[1][0].startswith("in r.yaml, --lr: invalid")


def test_a_later_source_wins_and_keeps_the_rest() -> None:
    from moelpr.arguments.flags import all_arguments

    parser = all_arguments()
    first, _ = parser.parse_tolerantly(["--lr", "1", "--data-path", "a", "b", "--seed", "5"])
    second, _ = parser.parse_tolerantly(["--lr", "2", "--data-path", "c"], first)
    assert (second.lr, second.data_path, second.seed) == (2.0, ["c"], 5)
    assert (first.lr, first.data_path) == (1.0, ["a", "b"])


def test_words_are_split_by_their_flags() -> None:
    from moelpr.arguments.flags import split_words

    words = ["--a", "1", "-2", "--b=3", "--c", "--a=4"]
    assert split_words(words, {"--a"}) == (["--a", "1", "-2", "--a=4"], ["--b=3", "--c"])
