"""The settings that the trainer's own code reads, final and typed. Megatron reads the others from its Namespace."""

from dataclasses import dataclass
from pathlib import Path

from moelpr.base.checksums import Verify
from moelpr.base.languages import canonical
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Stage, Stage1Experts
from moelpr.train.arguments.requested import RequestedRun


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts or resumes from, resolved once."""

    checkpoint: Path
    step_folder: Path  # the saved step in the checkpoint folder
    selected_step: int | None  # the number of that step if --ckpt-step selects it; None for the latest
    is_resumed: bool  # whether the checkpoint is this run's own, so that optimizer, data position and step are loaded
    # The folder of --pretrained-checkpoint, which a resumed run reads only for its frozen tensors.
    pretrained: Path | None
    saved_step: int | None  # the last step in --save; None if it has none


@dataclass(frozen=True)
class StageSettings:
    """The tensors that a stage trains, and its losses."""

    name: Stage
    train_everything: bool
    train_new_embeddings: bool
    stage1_experts: Stage1Experts  # the experts that tokens can choose in training
    # The weight of the balance loss, on the published code's scale; None without experts.
    balance_loss_coeff: float | None
    lpr_loss_coeff: float  # the weight of the LPR loss; 0 disables it


@dataclass(frozen=True)
class RunSettings:
    """A run's final settings."""

    stage: StageSettings
    start: Start
    spec: ModelSpec
    save: Path | None  # the folder to save to; None to save nothing
    save_trained_only: bool  # whether checkpoints omit frozen tensors
    verify: Verify  # how checkpoints are compared with their checksums before they are loaded
    data_path: tuple[str, ...]  # the corpora of --data-path and their weights
    validation_data: dict[str, str]  # language → prefix of its held-out corpus
    last_step: int
    log_interval: int  # the steps from one line of the log to the next
    grace_s: float | None  # the time in which a run that is asked to stop must make a step and save it

    @classmethod
    def of(cls, run: RequestedRun) -> "RunSettings":
        """The settings of a run without problems."""
        assert run.checkpoint is not None and run.step_folder is not None and run.spec is not None, "these are problems"
        args = run.args
        pretrained = Path(args.pretrained_checkpoint) if args.pretrained_checkpoint else None
        trains = args.train_everything, args.train_new_embeddings, args.stage1_experts
        return cls(
            StageSettings(args.stage, *trains, run.balance_loss_coeff, run.lpr_loss_coeff),
            Start(run.checkpoint, run.step_folder, run.step, run.is_resumed, pretrained, run.saved_step),
            run.spec,
            save=Path(args.save) if args.save else None,
            save_trained_only=args.save_trained_only,
            verify=Verify.NONE if args.no_verify else Verify.FULL,
            data_path=tuple(args.data_path or ()),
            validation_data={
                canonical(language): prefix
                for language, _, prefix in (item.partition("=") for item in args.validation_data or ())
            },
            last_step=args.train_iters,
            log_interval=args.log_interval,
            grace_s=args.grace_seconds,
        )
