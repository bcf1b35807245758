"""Megatron's flags that this trainer is tested with, and those that it refuses.

Every other flag of Megatron needs --allow-untested. A new version of Megatron adds flags that nobody has tried here, so
what is not listed is not taken for granted. Names are flags without their dashes; behind = is what a flag takes: N is
an integer, X a number, + one or more of it, and * any number.
"""

# By topic: start and data, length, validation, optimizer, precision, layout, memory and kernels, model, saving, logs.
_SUPPORTED = """
    pretrained-checkpoint=TEXT load=TEXT finetune ckpt-step=N no-load-optim no-load-rng data-path=TEXT*
    data-cache-path=TEXT dataloader-type=single|cyclic|external dataloader-inter-document-masking eod-mask-loss
    mid-level-dataset-surplus=X num-workers=N num-dataset-builder-threads=N no-mmap-bin-files iterations-to-skip=N+
    seq-length=N micro-batch-size=N global-batch-size=N train-iters=N seed=N
    calculate-per-token-loss exit-interval=N exit-duration-in-mins=N exit-signal-handler manual-gc
    manual-gc-interval=N eval-interval=N eval-iters=N
    optimizer=adam|sgd|muon|dist_muon|lion|soap|adaptive_muon adam-beta1=X adam-beta2=X adam-eps=X sgd-momentum=X
    clip-grad=X weight-decay=X lr=X min-lr=X decoupled-lr=X decoupled-min-lr=X
    lr-decay-style=constant|linear|cosine|inverse-square-root|WSD lr-decay-iters=N
    lr-warmup-fraction=X lr-warmup-iters=N lr-warmup-init=X
    lr-wsd-decay-style=exponential|linear|cosine|minus_sqrt lr-wsd-decay-iters=N
    override-opt-param-scheduler override-opt_param-scheduler use-distributed-optimizer overlap-grad-reduce
    overlap-param-gather ddp-bucket-size=N ddp-num-buckets=N use-precision-aware-optimizer
    main-grads-dtype=fp32|bf16 optimizer-cpu-offload bf16 fp16 loss-scale=X initial-loss-scale=X min-loss-scale=X
    loss-scale-window=X hysteresis=N grad-reduce-in-bf16 accumulate-allreduce-grads-in-fp32 fp32-residual-connection
    attention-softmax-in-fp32 moe-router-dtype=fp32|fp64 tensor-model-parallel-size=N sequence-parallel
    pipeline-model-parallel-size=N context-parallel-size=N expert-model-parallel-size=N
    expert-tensor-parallel-size=N num-virtual-stages-per-pipeline-rank=N
    microbatch-group-size-per-virtual-pipeline-stage=N decoder-first-pipeline-num-layers=N
    decoder-last-pipeline-num-layers=N no-overlap-p2p-communication make-vocab-size-divisible-by=N
    distributed-timeout-minutes=N gpu-sniff-test-interval=N recompute-activations
    recompute-granularity=full|selective recompute-method=uniform|block recompute-num-layers=N
    recompute-modules=TEXT+ transformer-impl=local|transformer_engine|inference_optimized
    attention-backend=flash|fused|unfused|local|auto moe-grouped-gemm moe-permute-fusion moe-router-fusion
    no-gradient-accumulation-fusion no-rope-fusion no-bias-swiglu-fusion no-bias-dropout-fusion
    no-masked-softmax-fusion no-persist-layer-norm cross-entropy-loss-fusion attention-dropout=X hidden-dropout=X
    init-method-std=X enable-ft-package calc-ft-timeouts ft-num-warmup-iters=N save=TEXT save-interval=N
    persistent-save-interval=N save-retain-interval=N no-save-optim no-save-rng async-save
    dist-ckpt-optim-fully-reshardable ckpt-fully-parallel-load ckpt-assume-constant-structure log-interval=N
    log-throughput log-num-zeros-in-grad log-progress log-memory-interval=N log-max-attention-logit
    log-timers-to-tensorboard log-validation-ppl-to-tensorboard log-memory-to-tensorboard
    log-world-size-to-tensorboard timing-log-level=0|1|2 timing-log-option=max|minmax|all tensorboard-dir=TEXT
    tensorboard-log-interval=N tensorboard-queue-size=N wandb-project=TEXT wandb-exp-name=TEXT wandb-save-dir=TEXT
    wandb-entity=TEXT log-straggler straggler-minmax-count=N straggler-ctrlr-port=N disable-straggler-on-startup
"""

# Flags that the trainer cannot support, tested or not: the reason, and an alternative.
_REFUSED = {
    "its file would replace all other settings; use --recipe": "yaml-cfg",
    "the trainer builds its own layers; remove it": "spec",
    "weights come from the checkpoint; remove it": "init-model-with-meta-device load-main-params-from-ckpt",
    "use moelpr model convert --num-new-experts N instead": "moe-use-upcycling",
    "it is computed from --balance-loss-coeff; use that": "moe-aux-loss-coeff",
    "it follows from the vocabulary and --tensor-model-parallel-size; remove it": "padded-vocab-size",
    "frozen weights would stay on the CPU; remove it": "use-cpu-initialization",
    "use --num-virtual-stages-per-pipeline-rank": "num-layers-per-virtual-pipeline-stage",
    "use --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers": """
        pipeline-model-parallel-layout account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
    """,
    "experts are saved from DDP's layout; use --use-distributed-optimizer": "use-torch-fsdp2 use-megatron-fsdp",
    "corpora contain token IDs; remove it": "tokenizer-type tokenizer-model vocab-file merge-file",
    "it has no language bits; use --data-path PREFIX": "mock-data",
    "list corpora in --data-path, also of a recipe": "data-args-path train-data-path per-split-data-args-path",
    "hold text out with moelpr data preprocess --validation-share, and pass --validation-data LANG=PREFIX": """
        split valid-data-path test-data-path full-validation multiple-validation-sets validation-set-names
    """,
    "held-out text is read in the batches of training; remove it": "eval-global-batch-size eval-micro-batch-size",
    "it reads the data of skipped steps by itself; use --iterations-to-skip": "result-rejected-tracker-filename",
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
    "Megatron's HybridModel ignores it; remove it": """
        cpu-offloading-num-layers fp8-output-proj defer-embedding-wgrad-compute
    """,
    "it copies all frozen weights in each step; remove it": "log-params-norm",
    "pass the settings of the old schedule, or --override-opt-param-scheduler": """
        use-checkpoint-opt-param-scheduler use-checkpoint-opt_param-scheduler
    """,
    "a run counts in steps; use --train-iters, --lr-decay-iters, --lr-warmup-iters or --lr-wsd-decay-iters": """
        train-samples lr-decay-samples lr-warmup-samples lr-wsd-decay-samples
    """,
    "use --weight-decay": "weight-decay-incr-style start-weight-decay end-weight-decay",
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

SUPPORTED = {name: value for name, _, value in (word.partition("=") for word in _SUPPORTED.split())}
REFUSED = {name: reason for reason, names in _REFUSED.items() for name in names.split()}
