"""Commands print one line, and end with one message and exit code 2 for invalid input, 1 for a full disk."""

from checkpoint_convert import convert as importer
from checkpoint_convert import export as exporter
from checkpoint_convert import graft as grafter
from checkpoint_convert import verify
from checkpoint_convert.compare.tensors import compare, largest_difference
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.model_spec import ModelSpec
from tests.support.commands import moelpr
from tests.support.hf_models import assert_nothing_left, write_export


def test_a_full_disk_exits_with_one_message_and_code_1(qwen2, tmp_path, monkeypatch, exit_code, capsys) -> None:
    """/dev/full rejects every write like a full disk; torch.save raises its own error instead."""
    real_open = open

    def open_full(path, mode="r", *args, **kwargs):
        full = "w" in mode and any(kind in str(path) for kind in (".distcp", ".safetensors"))
        return real_open("/dev/full" if full else path, mode, *args, **kwargs)

    export = write_export(qwen2, tmp_path, NewExperts(4))
    monkeypatch.setattr("builtins.open", open_full)
    for main, arguments in (
        (importer.main, ("--hf-path", qwen2, "--num-new-experts", 4)),
        (exporter.main, ("--load", tmp_path / "megatron", "--as", "granitemoe")),
        (exporter.main, ("--load", tmp_path / "megatron")),
        (grafter.main, ("--base", qwen2, "--instruct", qwen2, "--model", export)),
    ):
        assert exit_code(main, *arguments, "--save", tmp_path / "out") == 1
        assert "the disk is full" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    # With free space, the same command resumes.
    monkeypatch.undo()
    mcore_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert largest_difference(compare(tmp_path / "megatron", tmp_path / "out")) == 0
    assert_nothing_left(tmp_path)


def test_the_dense_ffn_gets_k_places_unless_the_user_or_an_moe_says_otherwise(qwen2, tmp_path) -> None:
    for name, words, places in (
        ("default", ("--hf-path", qwen2, "--topk", 3), (3, 3)),
        ("paper", ("--hf-path", qwen2, "--original-copies", 1), (1, 1)),
        ("second-round", ("--hf-path", tmp_path / "paper-hf"), (1, 2)),
    ):
        moelpr("model", "convert", *words, "--num-new-experts", 1, "--save", tmp_path / name)
        moe = ModelSpec.read(tmp_path / name).moe
        assert moe is not None and (moe.original_copies, moe.num_original_places) == places
        if name == "paper":
            mcore_to_hf(tmp_path / name, tmp_path / "paper-hf")


def test_invalid_arguments_exit_with_one_message_and_code_2(qwen2, upcycled, tmp_path, refused):
    convert = "--hf-path", qwen2, "--save", tmp_path / "out"
    write = "--load", upcycled, "--save", tmp_path / "out"
    for main, arguments, message in (
        (importer.main, (*convert, "--num-new-experts", 4, "--topk", 0), "--topk"),
        (importer.main, convert, "--num-new-experts"),
        (importer.main, (*convert, "--dense", "--moe-layers", "1"), "--dense"),
        (importer.main, (*convert, "--num-new-experts", 1, "--moe-layers", "a"), "layer numbers"),
        (exporter.main, (*write, "--max-shard-size", "big"), "5GB"),
        (exporter.main, (*write, "--as", "mixtral"), "--as qwen2_moe or granitemoe"),
        (exporter.main, (*write, "--as", "llama"), "--as"),
        (grafter.main, ("--base", qwen2, "--model", upcycled, "--save", "x"), "--instruct"),
        (verify.main, (qwen2,), "--reader"),
        (verify.main, (qwen2, qwen2, "--reader", "vllm"), "--reader"),
        (verify.main, (tmp_path / "none", "--reader", "vllm"), "none"),
    ):
        assert message in refused(main, *arguments)
        assert_nothing_left(tmp_path)


def test_the_last_line_and_the_card_say_which_programs_run_an_export(upcycled, tmp_path, exit_code, capsys) -> None:
    write = "--load", upcycled, "--save", tmp_path / "out"
    for options, other, is_in_vllm in (((), "granitemoe", True), (("--as", "granitemoe"), "qwen2_moe", False)):
        assert exit_code(exporter.main, *write, *options, "--overwrite") == 0
        *_, line = capsys.readouterr().out.splitlines()
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"--as {other}" in line and line in card and ("vllm serve" in card) == is_in_vllm
    assert exit_code(verify.main, tmp_path / "out", "--reader", "llama.cpp") == 0
    assert exit_code(verify.main, tmp_path / "out", "--reader", "vllm") == 1
    assert "vLLM: it has no biases in this class" in capsys.readouterr().out
