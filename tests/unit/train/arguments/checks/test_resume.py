from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from moelpr.model.model_spec import ModelSpec, MoeSpec, NewTokens

FLAT = {"use_distributed_optimizer": True}


def test_the_converters_folder_is_not_mistaken_for_a_run(upcycled: str, problems) -> None:
    (actual,) = problems("stage1", None, "--save", f"{upcycled}/")
    assert actual.startswith(upcycled) and "--pretrained-checkpoint" in actual


def test_a_run_of_another_model_is_not_resumed(make_checkpoint, dense_spec: ModelSpec, problems) -> None:
    run = make_checkpoint("run", stage="stage1")
    other = ModelSpec("llama", "float32", {**dense_spec.megatron_args, "num_layers": 2}, MoeSpec(8, 2, (0, 1), 5))
    start = make_checkpoint("other", other)
    (actual,) = problems("stage1", start, "--save", run)
    assert actual.startswith(run) and f"--pretrained-checkpoint {start}" in actual
    there = {"family": "llama", "num_original_experts": 5, "num_experts": 8, "moe_layer_freq": [1, 1], "num_layers": 2}
    for name, here in zip(there, ("qwen2", 1, 4, [1, 1, 1], 3), strict=True):
        assert f"{name} {there[name]} there, {here} in the run" in actual


@pytest.mark.parametrize("flag", ["--save-trained-only", "--train-new-embeddings"])
@pytest.mark.parametrize("before", [True, False])
def test_a_run_keeps_training_and_saving_the_same_tensors(make_checkpoint, moe_spec, problems, flag, before) -> None:
    spec = replace(moe_spec, new_tokens=NewTokens(100, 28, 128))
    run = make_checkpoint("run", spec, stage="stage1", **{flag[2:].replace("-", "_"): before})
    (actual,) = problems("stage1", None, "--save", run, *([] if before else [flag]))
    assert actual.startswith(f"{run} was started {'with' if before else 'without'} {flag}")


def test_the_first_start_may_have_been_deleted(make_checkpoint, accepted, tmp_path: Path) -> None:
    run = make_checkpoint("run", stage="stage1")
    assert accepted("stage1", tmp_path / "deleted", "--save", run)["model_source"] == run


# Another value of each setting, in the record of the run, and what the setting depends on.
OF_THE_SCHEDULE = yaml.safe_load("""
{
    lr: [7.0, {}], min_lr: [7.0, {}], decoupled_lr: [7.0, {}], decoupled_min_lr: [7.0, {}],
    lr_decay_style: [cosine, {}], lr_decay_iters: [7, {}], lr_warmup_fraction: [0.5, {}],
    lr_warmup_iters: [7, {}], weight_decay: [7.0, {}],
    global_batch_size: [7, {}], train_iters: [7, {}], lr_warmup_init: [7.0, {}],
    lr_wsd_decay_style: [linear, {lr_decay_style: WSD, lr_wsd_decay_iters: 1}],
    lr_wsd_decay_iters: [2, {lr_decay_style: WSD}]
}
""")
OF_THE_OPTIMIZER = yaml.safe_load("""
{
    optimizer: [sgd, {}], use_distributed_optimizer: [true, {}], bf16: [true, {}], fp16: [true, {}],
    train_everything: [true, {}], decoupled_lr: [7.0, {}], adam_beta1: [0.5, {}], adam_beta2: [0.5, {}],
    adam_eps: [0.5, {}], bf16_moments: [true, {}]
}
""")
OF_FLAT_BUFFERS = yaml.safe_load("""
{
    tensor_model_parallel_size: [2, {}], pipeline_model_parallel_size: [3, {}],
    num_virtual_stages_per_pipeline_rank: [3, {virtual_pipeline_model_parallel_size: 3}],
    expert_model_parallel_size: [2, {}], expert_tensor_parallel_size: [2, {}],
    decoder_first_pipeline_num_layers: [1, {}], decoder_last_pipeline_num_layers: [1, {}],
    overlap_grad_reduce: [true, {}], ddp_num_buckets: [7, {}],
    ddp_bucket_size: [7, {overlap_grad_reduce: true}], moe_grouped_gemm: [true, {}],
    transformer_impl: [transformer_engine, {train_everything: true}], grad_reduce_in_bf16: [true, {bf16: true}],
    accumulate_allreduce_grads_in_fp32: [true, {fp16: true}]
}
""")


RESET, KEEP = "--no-load-optim", "--override-opt-param-scheduler"
TABLES = ((OF_THE_SCHEDULE, {}, KEEP), (OF_THE_OPTIMIZER, {}, RESET), (OF_FLAT_BUFFERS, FLAT, RESET))


@pytest.mark.parametrize(
    ("name", "value", "depends_on", "remedy"),
    [(name, case[0], base | case[1], remedy) for table, base, remedy in TABLES for name, case in table.items()],
)
def test_each_setting_is_compared(make_checkpoint, problems, name, value, depends_on, remedy) -> None:
    """Also one that was given at first and is omitted now."""
    run = make_checkpoint("run", stage="stage1", **(depends_on | {name: value}))
    argv = []
    for other, kept in depends_on.items():
        if other != "virtual_pipeline_model_parallel_size":
            argv += [f"--{other.replace('_', '-')}", *([] if kept is True else [str(kept)])]
    actual = problems("stage1", None, "--save", run, *argv)
    assert [line for line in actual if f"--{name.replace('_', '-')}" in line and remedy in line], actual


# recipe.yaml of the run; flags and processes now; parts of the message, null if the run resumes.
TABLE = yaml.safe_load("""
the same command: [{min_lr: 0.0}, "", 1, null]
a longer training with another end:
  [{min_lr: 0.0}, "--train-iters 4 --min-lr 1e-4", 1, ["with --min-lr 0.0, --train-iters 2,",
   "not --min-lr 0.0001, --train-iters 4;", --override-opt-param-scheduler]]
a longer training with the new schedule:
  [{min_lr: 0.0}, "--train-iters 4 --override-opt-param-scheduler", 1, null]
a longer training without optimizer state: [{min_lr: 0.0}, "--train-iters 4 --no-load-optim", 1, null]
"a decay of its own length, a longer training (Megatron compares the weight decay's, too)":
  [{min_lr: 0.0, lr_decay_iters: 2}, "--lr-decay-iters 2 --train-iters 4", 1,
   ["with --train-iters 2, ", "not --train-iters 4;"]]
a decay over the whole training omitted: [{min_lr: 0.0, lr_decay_iters: 2}, "", 1, null]
another decay omitted: [{min_lr: 0.0, lr_decay_iters: 1}, "", 1, ["--lr-decay-iters 1,", "--lr-decay-iters 2;"]]
more data-parallel ranks make a larger batch:
  [{min_lr: 0.0, global_batch_size: 2}, "", 2, ["--global-batch-size 2,", "not --global-batch-size 4;"]]
tensor-parallel ranks do not:
  [{min_lr: 0.0, global_batch_size: 2}, "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1", 2, null]
the same batch on more ranks:
  [{min_lr: 0.0, global_batch_size: 2}, "--micro-batch-size 1 --global-batch-size 2", 2, null]
more processes: [{}, "", 2, null]
experts spread out: [{}, "--expert-model-parallel-size 2", 2, null]
experts no longer split with the model:
  [{}, "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1", 2, null]
a pipeline: [{}, "--pipeline-model-parallel-size 3", 3, null]
"flat buffers, more processes": [{use_distributed_optimizer: true}, "--use-distributed-optimizer", 2, null]
"flat buffers, other buckets with more processes":
  [{use_distributed_optimizer: true, overlap_grad_reduce: true, ddp_bucket_size: 1000},
   "--use-distributed-optimizer --overlap-grad-reduce", 2,
   [" --ddp-bucket-size 1000", --no-load-optim, --dist-ckpt-optim-fully-reshardable]]
"flat buffers, larger buckets of more processes":
  [{use_distributed_optimizer: true, overlap_grad_reduce: true, world_size: 48, global_batch_size: 128},
   "--use-distributed-optimizer --overlap-grad-reduce --global-batch-size 128", 64, [" --ddp-bucket-size 48000000"]]
"flat buffers, buckets kept with more processes":
  [{use_distributed_optimizer: true, overlap_grad_reduce: true, world_size: 48, global_batch_size: 128},
   "--use-distributed-optimizer --overlap-grad-reduce --global-batch-size 128 --ddp-bucket-size 48000000", 64, null]
"flat buffers, stages of one size before":
  [{use_distributed_optimizer: true, pipeline_model_parallel_size: 2},
   "--use-distributed-optimizer --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", 2,
   [" no --decoder-first-pipeline-num-layers;"]]
"flat buffers without experts, another layout of the experts":
  [{stage: stage2, use_distributed_optimizer: true},
   "--use-distributed-optimizer --expert-model-parallel-size 2", 2, null]
"flat buffers of everything, another layout of the experts":
  [{stage: stage2, use_distributed_optimizer: true, train_everything: true},
   "--use-distributed-optimizer --train-everything --expert-model-parallel-size 2", 2,
   ["--expert-model-parallel-size 1"]]
"flat buffers, another implementation of what is frozen":
  [{use_distributed_optimizer: true, transformer_impl: transformer_engine}, "--use-distributed-optimizer", 1, null]
"reshardable, another kernel of the experts":
  [{use_distributed_optimizer: true, dist_ckpt_optim_fully_reshardable: true, moe_grouped_gemm: true},
   "--use-distributed-optimizer", 1, null]
"reshardable, a pipeline":
  [{use_distributed_optimizer: true, dist_ckpt_optim_fully_reshardable: true},
   "--use-distributed-optimizer --pipeline-model-parallel-size 3", 3, null]
another optimizer:
  [{}, "--use-distributed-optimizer", 1, [" no --use-distributed-optimizer", --no-load-optim]]
state was not saved:
  [{use_distributed_optimizer: true, no_save_optim: true}, "--expert-model-parallel-size 2", 2, null]
state is not loaded: [{use_distributed_optimizer: true}, "--no-load-optim --expert-model-parallel-size 2", 2, null]
""")


@pytest.mark.parametrize("case", TABLE)
def test_a_run_resumes_if_its_schedule_and_optimizer_state_fit(upcycled, make_checkpoint, problems, accepted, case):
    before, argv, ranks, parts = TABLE[case]
    run = make_checkpoint("run", **({"stage": "stage1"} | before))
    command = [before.get("stage", "stage1"), upcycled, "--save", run, *argv.split()]
    if parts is None:
        assert accepted(*command, ranks=ranks)["model_source"] == run
        return
    (actual,) = problems(*command, ranks=ranks)
    assert actual.startswith(f"{run} was trained with ") and all(part in actual for part in parts), actual


def test_a_run_without_optimizer_state_is_resumed_by_the_same_command(make_checkpoint, accepted, capsys) -> None:
    run = make_checkpoint("run", stage="stage1", no_save_optim=True)
    for flags in ([], ["--no-load-optim"]):
        actual = accepted("stage1", f"{run}-start", "--save", run, "--no-save-optim", *flags)
        assert actual["is_resumed"] and actual["no_load_optim"]
        assert (f"enabled --no-load-optim, because {run}" in capsys.readouterr().err) == (not flags)
    assert not accepted("stage1", run, "--save", f"{run}-new")["no_load_optim"]
