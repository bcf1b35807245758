"""A stage from arguments to checkpoint: data, model, freezing -> Megatron's own pretrain()."""

import argparse
import os
from collections.abc import Callable
from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain, print_rank_0
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)

from moelpr.base.ranks import is_first_rank
from moelpr.data.batch import BatchReader
from moelpr.data.dataset import build_datasets, corpus_table, dataset_config
from moelpr.model.checkpoints.chain import verify_step, write_checksums
from moelpr.model.layers.builder import MoELPRModelConfig
from moelpr.model.layers.config import MoELPRConfig
from moelpr.model.layers.freezing import freeze, parameter_report
from moelpr.model.layers.fused_loss import fuse_loss
from moelpr.model.layers.new_rows import ROWS
from moelpr.model.layers.vocabulary import mask_padding
from moelpr.model.megatron import bootstrap, checkpoint_reading, checkpoint_sums, hooks
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import Workload, model_parts
from moelpr.plan.step_time import stage_flops
from moelpr.train import clean_stop
from moelpr.train.arguments.parse import check_arguments, refused_by_megatron, register_arguments
from moelpr.train.arguments.settings import RunSettings
from moelpr.train.clean_stop import StopRequest
from moelpr.train.early_stop import EarlyStop
from moelpr.train.forward_step import forward_step
from moelpr.train.run_files import run_records
from moelpr.train.run_lock import run_lock
from moelpr.train.run_log import report_nonfinite_exit
from moelpr.train.starting_weights import starting_weights
from moelpr.train.step_log import logs_steps
from moelpr.train.validation import validates

type LoadWeights = Callable[[list[torch.nn.Module]], None]
# Returns the function that fills a model before it is wrapped.
type FindWeights = Callable[[RunSettings, argparse.Namespace], LoadWeights]


def keep_weights(settings: RunSettings, args: argparse.Namespace) -> LoadWeights:
    """Load no weights: the model keeps those that Megatron initialized."""

    def load(chunks: list[torch.nn.Module]) -> None:
        args.load = args.pretrained_checkpoint = None  # or Megatron would load them

    return load


def train(argv: list[str], stop: StopRequest | None = None, weights: FindWeights = starting_weights) -> bool:
    """Train one stage on this rank with the command line `argv`, to its end or until `stop` receives a request.

    Returns:
        Whether the last step is made, on every rank.
    """
    run = check_arguments(argv)
    settings = RunSettings.of(run)
    with run_lock(settings):
        early_stop = EarlyStop(run, settings) if run.args.early_stop_patience else None
        if clean_stop.is_finished(settings, early_stop):
            return clean_stop.report_end(settings, settings.last_step, early_stop)
        return train_stage(settings, register_arguments(run, settings), argv, stop, weights, early_stop)


def train_stage(
    settings: RunSettings,
    args: argparse.Namespace,
    argv: list[str],
    stop: StopRequest | None,
    weights: FindWeights,
    early_stop: EarlyStop | None,
) -> bool:
    """Train with checked settings; `args` are those registered with Megatron."""
    if settings.save is not None:  # the last collectives of ranks that hang; /tmp may end with a container
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(settings.save / "nccl_trace_rank_"))
    load_weights, stage, batches = weights(settings, args), settings.stage, BatchReader()
    with (
        run_records(settings, args, argv),
        hooks.after_step_is_read(lambda step: verify_step(step, checkpoint_reading.taken(step), settings.verify)),
        hooks.after_step_is_written(lambda step, _: write_checksums(step, checkpoint_sums.taken(step))),
        hooks.without_weight_decay(ROWS),
        hooks.before_schedule(batches.read),
        hooks.operations_per_sequence(operations_per_sequence(settings, args.seq_length)),
        logs_steps(settings, args) as step_log,
        report_nonfinite_exit(step_log.run_log, args),
        validates(settings, args, step_log, early_stop) as validation,
        clean_stop.stops_on_request(settings, stop),
    ):

        def prepare(model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
            trained = stage.name, stage.train_everything, stage.train_new_embeddings
            freeze(model_chunks, *trained, settings.spec.new_tokens)
            load_weights(model_chunks)
            with_loss = fuse_loss if args.cross_entropy_loss_fusion else mask_padding
            with_loss(model_chunks, settings.spec.megatron_args["vocab_size"])
            print_rank_0(parameter_report(model_chunks))
            return step_log.tracker.watch(model_chunks)

        config = model_config(args)
        config.pre_wrap_hooks.append(prepare)  # before Megatron wraps the model for data parallelism
        container = pretrain_cfg_container_from_args(args, config)
        datasets, step = partial(datasets_provider, args), partial(forward_step, batches, step_log.clock)
        datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it; the builder has barriers
        pretrain(container, datasets, ModelType.encoder_or_decoder, step, store=bootstrap.rank_store())
    torch.distributed.barrier()
    scored_step = settings.last_step if validation is None else validation.scored_step
    is_complete = clean_stop.report_end(settings, scored_step, early_stop)
    answer = torch.tensor([is_complete], dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.broadcast(answer, src=0)
    return bool(answer.item())


def operations_per_sequence(settings: RunSettings, seq_length: int) -> float:
    """The operations of matrix products for one sequence, forward and backward, without what is recomputed."""
    spec, stage = settings.spec, settings.stage
    workload = Workload(
        stage.name,
        seq_length,
        micro_batch_size=1,
        global_batch_size=1,
        new_embeddings=stage.train_new_embeddings,
        train_everything=stage.train_everything,
        stage1_experts=stage.stage1_experts,
    )
    return stage_flops(spec, model_parts(spec), PlannedLayout(tp=1, pp=1, ep=1, etp=1, dp=1), workload, 0).once


def model_config(args: argparse.Namespace) -> MoELPRModelConfig:
    """The model that `args` describe; UserError if Megatron rejects them."""
    try:
        transformer = core_transformer_config_from_args(args, config_class=MoELPRConfig)
        config = hybrid_config_from_args(args, transformer, MoELPRModelConfig)
    except (AssertionError, ValueError) as error:
        raise refused_by_megatron(error) from error
    config.rope_scaling, config.rope_scaling_factor = args.use_rope_scaling, args.rope_scaling_factor
    return config


def datasets_provider(args: argparse.Namespace, num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """Training, validation and test datasets."""
    if args.validation_data:  # moelpr.train.validation reads it
        num_samples = [num_samples[0], 0, 0]
    train, *others = build_datasets(num_samples, dataset_config(args))
    if is_first_rank() and train is not None:
        print_rank_0(corpus_table(train, num_samples[0]))
    return train, *others
