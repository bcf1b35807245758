"""Megatron's flags that this trainer is tested with, and those that it refuses.

Every other flag of Megatron needs --allow-untested. A new version of Megatron adds flags that nobody has tried here, so
what is not listed is not taken for granted. Names are flags without their dashes.
"""

_SUPPORTED = {
    "start and data": """
        pretrained-checkpoint load finetune ckpt-step no-load-optim no-load-rng
        data-path data-args-path train-data-path valid-data-path test-data-path per-split-data-args-path split
        data-cache-path dataloader-type dataloader-inter-document-masking eod-mask-loss mid-level-dataset-surplus
        num-workers num-dataset-builder-threads no-mmap-bin-files iterations-to-skip result-rejected-tracker-filename
    """,
    "length and batches": """
        seq-length micro-batch-size global-batch-size train-iters train-samples seed calculate-per-token-loss
        exit-interval exit-duration-in-mins exit-signal-handler manual-gc manual-gc-interval
    """,
    "validation": """
        eval-interval eval-iters eval-global-batch-size eval-micro-batch-size full-validation multiple-validation-sets
        validation-set-names
    """,
    "optimizer": """
        optimizer adam-beta1 adam-beta2 adam-eps sgd-momentum clip-grad weight-decay start-weight-decay end-weight-decay
        weight-decay-incr-style lr min-lr decoupled-lr decoupled-min-lr lr-decay-style lr-decay-iters lr-decay-samples
        lr-warmup-fraction lr-warmup-iters lr-warmup-samples lr-warmup-init lr-wsd-decay-style lr-wsd-decay-iters
        lr-wsd-decay-samples override-opt-param-scheduler override-opt_param-scheduler
        use-checkpoint-opt-param-scheduler use-checkpoint-opt_param-scheduler
        use-distributed-optimizer overlap-grad-reduce overlap-param-gather
        ddp-bucket-size ddp-num-buckets use-precision-aware-optimizer main-grads-dtype defer-embedding-wgrad-compute
        optimizer-cpu-offload
    """,
    "precision": """
        bf16 fp16 loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis grad-reduce-in-bf16
        accumulate-allreduce-grads-in-fp32 fp32-residual-connection attention-softmax-in-fp32 moe-router-dtype
    """,
    "parallel layout": """
        tensor-model-parallel-size sequence-parallel pipeline-model-parallel-size context-parallel-size
        expert-model-parallel-size expert-tensor-parallel-size num-layers-per-virtual-pipeline-stage
        num-virtual-stages-per-pipeline-rank microbatch-group-size-per-virtual-pipeline-stage
        pipeline-model-parallel-layout decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
        account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split no-overlap-p2p-communication
        make-vocab-size-divisible-by distributed-timeout-minutes gpu-sniff-test-interval
    """,
    "memory and kernels": """
        recompute-activations recompute-granularity recompute-method recompute-num-layers recompute-modules
        transformer-impl attention-backend moe-grouped-gemm moe-permute-fusion moe-router-fusion
        no-gradient-accumulation-fusion no-rope-fusion no-bias-swiglu-fusion no-bias-dropout-fusion
        no-masked-softmax-fusion no-persist-layer-norm cross-entropy-loss-fusion
    """,
    "model": "attention-dropout hidden-dropout init-method-std",
    "hangs": "enable-ft-package calc-ft-timeouts ft-num-warmup-iters",
    "checkpoints": """
        save save-interval persistent-save-interval save-retain-interval no-save-optim no-save-rng async-save
        dist-ckpt-optim-fully-reshardable save-dgrads-interval save-activations-interval
        ckpt-fully-parallel-load ckpt-assume-constant-structure
    """,
    "log": """
        log-interval log-throughput log-params-norm log-num-zeros-in-grad log-progress log-memory-interval
        log-max-attention-logit log-timers-to-tensorboard log-validation-ppl-to-tensorboard log-memory-to-tensorboard
        log-world-size-to-tensorboard timing-log-level timing-log-option tensorboard-dir tensorboard-log-interval
        tensorboard-queue-size wandb-project wandb-exp-name wandb-save-dir wandb-entity
        log-straggler straggler-minmax-count straggler-ctrlr-port disable-straggler-on-startup
    """,
}

# Flags that the trainer cannot support, tested or not: the reason, and an alternative.
_REFUSED = {
    "its file would replace all other settings; use --recipe": "yaml-cfg",
    "the trainer builds its own layers; remove it": "spec",
    "weights come from the checkpoint; remove it": "init-model-with-meta-device load-main-params-from-ckpt",
    "use moelpr model convert --num-new-experts N instead": "moe-use-upcycling",
    "it is computed from --balance-loss-coeff; use that": "moe-aux-loss-coeff",
    "it follows from the vocabulary and --tensor-model-parallel-size; remove it": "padded-vocab-size",
    "frozen weights would stay on the CPU; remove it": "use-cpu-initialization",
    "experts are saved from DDP's layout; use --use-distributed-optimizer": "use-torch-fsdp2 use-megatron-fsdp",
    "corpora contain token IDs; remove it": "tokenizer-type tokenizer-model vocab-file merge-file",
    "it has no language bits; use --data-path PREFIX": "mock-data",
    "use --dataloader-inter-document-masking instead": "reset-attention-mask reset-position-ids",
    "a resumed run would read the text from its start; remove it": "phase-transition-iterations",
    "a step would be saved twice where the size changes; use --global-batch-size": """
        rampup-batch-size step-batch-size-schedule
    """,
    "Megatron would average validation differently; mask text when you preprocess it": "sft",
    "a run always saves and ends at SIGUSR1 and SIGTERM; remove it": "exit-signal",
    "a resumed run would go on with a wrong step count on the GPU; remove it": "optimizer-offload-fraction",
    "its steps have no checksums and replace that of --ckpt-step; use --save-interval": "non-persistent-ckpt-type",
    "other formats can be neither exported nor resumed under another layout; remove it": "ckpt-format",
    "Megatron's HybridModel ignores it; remove it": "cpu-offloading-num-layers fp8-output-proj",
    "lock, log and hooks of a run open once per process; use --enable-ft-package with ft_launcher": """
        inprocess-restart
    """,
    "it does not check the first step for NaN, and saves steps that cannot be loaded; remove it": "rerun-mode",
    "no checkpoint of this trainer has it, and an export would compute without it; remove it": """
        multi-latent-attention mtp-num-layers hybrid-layer-pattern hybrid-override-pattern no-rope-freq
        heterogeneous-layers-config-path experimental-attention-variant window-attn-skip-freq rotary-interleaved
        activation-func-clamp-value rotary-seq-len-interpolation-factor apply-layernorm-1p use-mup qk-l2-norm
        attention-output-gate softmax-type glu-linear-offset
    """,
}

SUPPORTED = frozenset(name for names in _SUPPORTED.values() for name in names.split())
REFUSED = {name: reason for reason, names in _REFUSED.items() for name in names.split()}
