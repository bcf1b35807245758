"""One wrong setting is one message, which names the flag, what was found and what helps."""

import re
import shlex

import pytest

from moelpr.model.megatron import cpu

SHORT = {
    "TP": "--tensor-model-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "EP": "--expert-model-parallel-size",
    "ETP": "--expert-tensor-parallel-size",
    "CP": "--context-parallel-size",
    "VIRTUAL": "--num-virtual-stages-per-pipeline-rank",
    "GROUP": "--microbatch-group-size-per-virtual-pipeline-stage",
    "BATCH": "--global-batch-size",
    "APART": "--dataloader-inter-document-masking",
}

# [ranks] stage checkpoint flags -> the start of the message … further parts.
# CORPUS has one token, HELD text of an original language, MIXED of both groups.
TABLE = """
stage1 upcycled --train-samples 10 -> --train-samples is not supported … --train-iters
stage1 upcycled --train-tokens 64K --train-epochs 1 -> --train-iters and --train-tokens and --train-epochs are
stage1 upcycled --fp32 --bf16 -> --bf16 and --fp32 … keep one
stage1 upcycled --optimizer sgd --use-distributed-optimizer -> --use-distributed-optimizer … --optimizer adam
stage1 upcycled --optimizer-cpu-offload -> --optimizer-cpu-offload … --optimizer adam … --use-distributed-optimizer
stage1 upcycled --optimizer-cpu-offload --use-distributed-optimizer --async-save -> --async-save … cpu-offload
stage1 upcycled --gpu-sniff-test-interval 5 -> --gpu-sniff-test-interval … none; remove it
stage1 upcycled --manual-gc --manual-gc-interval -1 -> --manual-gc-interval must be at least 0
stage1 upcycled --inprocess-restart -> --inprocess-restart … --enable-ft-package
stage1 upcycled --log-straggler -> --log-straggler … none; remove it
stage1 upcycled --enable-ft-package -> --enable-ft-package requires --save … ft_launcher
stage1 upcycled --bf16-moments --use-distributed-optimizer -> --bf16-moments requires Transformer Engine
stage1 upcycled --cross-entropy-loss-fusion --train-everything -> --cross-entropy-loss-fusion … remove it
stage1 upcycled --optimizer lion -> --optimizer lion … emerging-optimizers
stage1 upcycled --seq-length 65 -> --seq-length must be at most 64
stage1 upcycled --min-lr 1 -> --min-lr must be at most --lr 0.001, got 1.0
stage1 upcycled --lr -1 -> --lr must be at least 0, got -1
stage1 upcycled --lr inf -> --lr must be at least 0, got inf
stage1 upcycled --lpr-loss-coeff -0.1 -> --lpr-loss-coeff must be at least 0, got -0.1
stage1 upcycled --seed 0 -> --seed must be at least 1 and below 2,147,483,648, got 0
stage1 upcycled --weight-decay nan -> --weight-decay must be at least 0, got nan
stage1 upcycled --adam-beta1 1 -> --adam-beta1 must be at least 0 and below 1, got 1
stage1 upcycled --adam-eps nan -> --adam-eps must be a number, got nan
stage1 upcycled --lr-warmup-iters 2 -> --lr-warmup-iters must be below --train-iters 2, got 2
stage1 upcycled --lr-warmup-iters 9 --lr-decay-iters 9 -> --lr-warmup-iters must be below --lr-decay-iters 9
stage1 upcycled --lr-warmup-init 0.1 -> --lr-warmup-init must be at most --lr 0.001, got 0.1
stage1 upcycled --lr-decay-style WSD -> --lr-decay-style WSD … --lr-wsd-decay-iters N
stage1 upcycled --overlap-param-gather -> Megatron … only supported with distributed optimizer
stage1 upcycled --recompute-granularity full -> Megatron … "block" or "uniform"

4 stage1 upcycled TP 4 ETP 2 -> ETP must be 1 or TP 4, got 2 … one of 1, 4
stage1 upcycled BATCH 3 -> BATCH 3 … use 2 or 4
2 dense dense EP 2 -> EP … dense
2 stage1 upcycled PP 2 --decoder-first-pipeline-num-layers 3 -> Megatron … Mismatch
2 stage1 six PP 2 BATCH 4 VIRTUAL 2 -> VIRTUAL 2 does not divide the 3 layers … one of 1, 3
2 stage1 six PP 2 BATCH 4 VIRTUAL 3 --no-overlap-p2p-communication -> Megatron … size should be greater than 2
2 stage1 six PP 2 BATCH 6 VIRTUAL 3 -> BATCH 6 makes 3 micro-batches … multiple of 4, such as 4 or 8
2 stage1 six PP 2 BATCH 4 VIRTUAL 3 GROUP 4 -> BATCH 4 makes 2 micro-batches … multiple of 8
2 stage1 six PP 2 BATCH 4 VIRTUAL 3 GROUP 1 -> GROUP must be at least
stage1 six VIRTUAL 2 -> Megatron … pipeline-model-parallel size should be greater than 1

stage2 dense -> --stage stage2 … CHECKPOINT … --num-new-experts
stage1 one-choice -> --stage stage1 … K = 1 … ffn … combine
stage2 one-choice -> --stage stage2 … K = 1
dense upcycled -> --stage dense … CHECKPOINT … --stage stage1 or stage2
stage1 upcycled --moe-router-topk 1 -> --moe-router-topk 1 contradicts the checkpoint CHECKPOINT … has 2;
stage1 upcycled --untie-embeddings-and-output-weights -> --untie-embeddings-and-output-weights True … has False;
stage1 upcycled --moe-layer-freq [0,1,1] -> --moe-layer-freq [0, 1, 1] contradicts … has [1, 1, 1];
stage1 upcycled --window-size 8,0 -> --window-size (8, 0) contradicts … has None;
stage1 upcycled --use-rope-scaling -> --use-rope-scaling True contradicts … has False;
stage1 upcycled --residual-multiplier 0.5 -> --residual-multiplier 0.5 contradicts … has 1.0;
stage1 second-round --num-original-experts 1 -> --num-original-experts 1 contradicts … has 3;
stage1 upcycled --save-trained-only --train-everything -> --save-trained-only … --train-everything
stage1 upcycled --yaml-cfg a.yaml -> --yaml-cfg is not supported … --recipe
stage1 upcycled --split 99,1,0 -> --split is not supported … --validation-data LANG=PREFIX
stage1 upcycled --data-args-path corpora.txt -> --data-args-path is not supported … --data-path
stage1 upcycled --log-params-norm -> --log-params-norm is not supported
2 stage1 six PP 2 BATCH 4 --num-layers-per-virtual-pipeline-stage 1 -> --num-layers-per … use VIRTUAL
2 stage1 six PP 2 --pipeline-model-parallel-layout Et*3|t*3L -> --pipeline-model-parallel-layout … --decoder-first
stage1 upcycled --moe-router-pre-softmax -> --moe-router-pre-softmax is not supported … remove
stage1 upcycled --qk-clip --allow-untested qk-clip -> --qk-clip is not supported
stage1 upcycled --fim-data -> --fim-data is not tested with this trainer … --allow-untested fim-data
stage1 upcycled --allow-untested empty-unused-memory -> --allow-untested … did you mean empty-unused-memory-level?
stage2 upcycled --stage1-experts new -> --stage1-experts new … --stage stage1 … remove
stage1 upcycled --stage1-experts new --train-everything -> --stage1-experts new … --train-everything … remove
stage1 upcycled --stage1-experts new --lpr-loss-coeff 0.1 -> --lpr-loss-coeff 0.1 … --stage1-experts new … remove
stage1 few --stage1-experts new -> --stage1-experts new … has 1 and top-k 2 … --topk
stage0 upcycled -> --stage stage0 … CHECKPOINT … --extended-tokenizer
stage1 upcycled --train-new-embeddings -> --train-new-embeddings … CHECKPOINT … --extended-tokenizer
stage0 grown --train-new-embeddings -> --train-new-embeddings applies to --stage stage1 … stage0
stage2 grown --train-new-embeddings -> --train-new-embeddings applies to --stage stage1 … stage2
stage0 grown --weight-decay 0.1 -> --weight-decay … stage0 … remove
stage0 grown --train-everything -> --train-everything … stage0 … remove
stage1 grown --train-everything --train-new-embeddings -> --train-new-embeddings … --train-everything … remove
stage1 upcycled --moe-grouped-gemm -> --moe-grouped-gemm requires Transformer Engine
stage1 upcycled --attention-dropout 0.1 -> --attention-dropout requires Transformer Engine
2 stage1 upcycled CP 2 -> CP requires Transformer Engine
stage1 upcycled --use-precision-aware-optimizer --use-distributed-optimizer -> --use-precision … Transformer Engine
stage1 upcycled --recompute-granularity selective --recompute-modules layernorm -> --recompute-modules … Engine

stage1 upcycled --data-path CORPUS CORPUS 1 CORPUS -> --data-path must be
stage1 upcycled --data-path 1 CORPUS -1 CORPUS -> the weight of CORPUS … got -1;
stage1 upcycled --data-path 1 CORPUS nan CORPUS -> the weight of CORPUS … got nan;
stage1 upcycled --validation-data HELD -> --validation-data … LANG=PREFIX … HELD
stage1 upcycled --validation-data en=HELD en=HELD -> --validation-data … en
stage1 upcycled --validation-data el=nowhere -> nowhere.bin … moelpr data preprocess
stage1 upcycled --validation-data xx=MIXED -> --validation-data xx=MIXED … original … expanded
stage1 upcycled --validation-data xx=CORPUS -> --validation-data xx=CORPUS … got 1
stage1 upcycled --eval-iters 10 -> --eval-iters requires --validation-data LANG=PREFIX
stage1 upcycled --iterations-to-skip 1 2 -> --iterations-to-skip can't contain the last step, 2
2 stage1 six --iterations-to-skip 1 PP 2 VIRTUAL 3 BATCH 4 -> --iterations-to-skip … virtual
"""

# [ranks] stage checkpoint flags -> final settings.
ACCEPTED = """
stage1 upcycled -> num_layers=3 num_experts=4 balance_loss_coeff=0.01 lpr_loss_coeff=0.0 moe_router_dtype=fp32
stage2 upcycled -> balance_loss_coeff=0.0 lpr_loss_coeff=0.1 save_interval=500
stage0 grown -> vocab_size=140 balance_loss_coeff=0.0 lpr_loss_coeff=0.0
stage1 grown --train-new-embeddings -> vocab_size=140 balance_loss_coeff=0.01 lpr_loss_coeff=0.0
stage1 second-round --num-original-experts 3 -> num_original_experts=3
stage1 second-round --stage1-experts new -> num_original_experts=3 stage1_experts=new
stage1 upcycled --num-experts 4 --moe-layer-freq [1,1,1] -> num_experts=4
stage1 upcycled --moe-token-dispatcher-type alltoall --ckpt-format torch_dist -> moe_token_dispatcher_type=alltoall
stage1 upcycled --lr-decay-style WSD --lr-wsd-decay-iters 1 --lr-warmup-init 1e-3 -> lr_wsd_decay_iters=1
stage1 upcycled --save-retain-interval 10000 --save-interval 300 -> save_retain_interval=10200
stage1 upcycled --save-retain-interval 10000 --save-interval 500 -> save_retain_interval=10000
stage1 odd -> vocab_size=131 padded_vocab_size=256
2 stage1 odd TP 2 ETP 1 -> padded_vocab_size=256
stage1 odd --make-vocab-size-divisible-by 1 -> padded_vocab_size=131
2 stage1 odd --make-vocab-size-divisible-by 1 TP 2 ETP 1 -> vocab_size=131 padded_vocab_size=132
2 stage1 upcycled BATCH 6 TP 2 ETP 1 -> data_parallel_size=1 sequence_parallel=True
2 dense dense TP 2 -> sequence_parallel=False
2 stage1 one-group TP 2 ETP 1 -> num_query_groups=1
4 stage1 upcycled TP 4 -> tensor_model_parallel_size=4
2 stage1 upcycled PP 2 --decoder-first-pipeline-num-layers 1 -> pipeline_model_parallel_size=2
2 stage2 six PP 2 VIRTUAL 3 BATCH 4 -> virtual_pipeline_model_parallel_size=3
2 stage1 six --iterations-to-skip 1 TP 2 ETP 1 -> create_attention_mask_in_dataloader=False
stage1 upcycled --iterations-to-skip 1 APART -> dataloader_inter_document_masking=True
"""


def rows(table: str) -> list[str]:
    return [line for line in table.splitlines() if line]


def parsed_row(row: str, **paths: str) -> tuple[int, list[str], str]:
    """Ranks, the words of the command, and what is expected."""
    command, expected = (
        re.sub(r"\b[A-Z]+\b", lambda word: (SHORT | paths).get(word[0], word[0]), side) for side in row.split(" -> ")
    )
    words = shlex.split(command)
    return (int(words.pop(0)) if words[0].isdigit() else 1), words, expected


@pytest.mark.parametrize("row", rows(TABLE))
def test_a_wrong_setting_is_one_message(problems, checkpoint, data, write_corpus, row: str) -> None:
    corpora = {"CORPUS": data[1]}
    if "HELD" in row or "MIXED" in row:
        corpora |= {"HELD": write_corpus("held", True, True), "MIXED": write_corpus("mixed", True, False)}
    ranks, (stage, name, *flags), expected = parsed_row(row, **corpora)
    start = checkpoint(name)
    (actual,) = problems(stage, start, *flags, ranks=ranks)
    first, *parts = expected.replace("CHECKPOINT", start).split(" … ")
    assert actual.startswith(first) and all(part in actual for part in parts), actual


@pytest.mark.parametrize("row", rows(ACCEPTED))
def test_valid_settings_arrive(accepted, checkpoint, row: str) -> None:
    ranks, (stage, name, *flags), expected = parsed_row(row)
    final = accepted(stage, checkpoint(name), *flags, ranks=ranks)
    for item in expected.split():
        setting, value = item.split("=")
        assert str(final[setting]) == value, item


def test_rows_of_grouped_gemm_are_checked_on_a_gpu_only(upcycled, problems, monkeypatch) -> None:
    with monkeypatch.context() as gpu:
        gpu.setattr(cpu, "is_needed", lambda: False)
        actual = problems("stage1", upcycled, SHORT["TP"], "4", ranks=4)
    assert [line for line in actual if "grouped GEMM" in line and "got 12" in line and f"use {SHORT['ETP']} 1" in line]


def test_all_required_flags_are_requested_at_once(upcycled: str, problems) -> None:
    actual = problems(None, upcycled, steps=False, with_data=False)
    expected = ["--stage stage1", "--micro-batch-size SEQUENCES", "--seq-length TOKENS", "--lr RATE"]
    expected += ["--train-iters STEPS", "--data-path PREFIX"]
    assert len(actual) == len(expected)
    for flag in expected:
        assert sum(f"pass {flag}" in line for line in actual) == 1, flag


def test_all_problems_are_reported_at_once(upcycled: str, problems) -> None:
    argv = "--lr fast --micro-batchsize 3 --num-layers 8 --moe-aux-loss-coeff=0.5 --expert-model-parallel-size 3 "
    argv += "--seq-length 65 --moe-token-dispatcher-type allgather --attention-dropout 0.1 --overlap-param-gather"
    actual = problems("stage1", upcycled, *argv.split(), ranks=3)
    expected = (
        "--lr must be at least 0, got fast",
        "unrecognized argument --micro-batchsize; did you mean --micro-batch-size?",
        "--num-layers 8 ",
        "--expert-model-parallel-size 3 ",
        "--seq-length must be at most 64",
        "--moe-token-dispatcher-type is not supported",
        "--moe-aux-loss-coeff ",
        "--attention-dropout ",
    )
    assert len(actual) == len(expected)  # Megatron's own errors come later
    for start in expected:
        assert sum(line.startswith(start) for line in actual) == 1, start


def test_an_invalid_stage_hides_no_problem_with_the_experts(upcycled: str, problems) -> None:
    actual = problems(None, upcycled, "--stage", "stage3", "--expert-model-parallel-size", "3", ranks=3)
    assert len(actual) == 2
    assert actual[0].startswith("--stage: ") and "stage0, stage1, stage2" in actual[0]
    assert actual[1].startswith("--expert-model-parallel-size 3 ")
