"""How long a run is and how corpora share it: --train-tokens, --train-epochs and --mix when a stage starts."""

from megatron.core.datasets.indexed_dataset import IndexedDataset

from moelpr.base.errors import UserError
from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.mixing import mixed, num_tokens, share_table
from moelpr.data.packing import windows_of
from moelpr.train.arguments.checks.data import has_conversations, training_blend
from moelpr.train.arguments.early import LENGTH_FLAGS
from moelpr.train.arguments.requested import RequestedRun


def set_train_iters(run: RequestedRun) -> str:
    """Compute the number of steps of a run whose length is given in tokens or epochs.

    Tokens are rounded up to whole steps, so that the budget is spent, and epochs down, so that no text is read more
    often than asked for. A budget that fills no step is added to `run.problems`.

    Returns:
        The budget and its steps, to be printed; "" if the length is given in steps, and if what it depends
        on is missing or wrong, which the checks report.
    """
    args, flags = run.args, [flag for flag in LENGTH_FLAGS if flag in run.given]
    batch, length = run.global_batch_size, args.seq_length or 0
    if len(flags) != 1 or batch < 1 or length < 1:
        return ""
    step = f"{batch:,} sequences of {length:,} tokens"
    if flags == ["--train-tokens"] and args.train_tokens:
        budget, tokens = f"{args.train_tokens:,} tokens", args.train_tokens
        steps = -(-tokens // (batch * length)) if tokens >= batch * length else 0
    elif flags == ["--train-epochs"] and (epochs := args.train_epochs) is not None:  # else reported by the checks
        prefixes, weights = training_blend(run)
        if not prefixes or not all(map(IndexedDataset.exists, prefixes)):
            return ""
        try:
            corpora = [*map(num_tokens, prefixes)]
            windows = [_num_windows(prefix, length, args.dataloader_inter_document_masking) for prefix in prefixes]
        except UserError as error:
            run.problems.append(str(error))
            return ""
        if weights is None and len(prefixes) > 1 and epochs > 1 and not args.mix:
            run.problems.append(
                f"--train-epochs {epochs:g} reads text again, and several corpora without weights are read once; give "
                "each corpus a weight (--data-path 1 A 1 B)"
            )
        budget = f"{epochs:g} epoch{'s' * (epochs != 1)} of {sum(corpora):,} tokens"
        # A sample has one more token than it predicts, the first of the next sample, and lies in one corpus.
        sequences = [
            max(0, int(epochs * tokens) - 1) // length if number is None else int(epochs * number)
            for tokens, number in zip(corpora, windows, strict=True)
        ]
        steps = sum(sequences) // batch
    else:
        return ""
    if steps < 1:
        run.problems.append(f"{budget} fill no step of {step}; raise {flags[0]}, or lower --global-batch-size")
        return ""
    args.train_iters = steps
    return f"{budget}: {steps:,} steps of {step}"


def set_weights(run: RequestedRun) -> str:
    """Compute the weights of --mix; returns the corpora's table, to be printed. Wrong values go to `run.problems`."""
    args = run.args
    if not args.mix:
        return ""
    total = (args.train_iters or 0) * run.global_batch_size * (args.seq_length or 0)
    prefixes, weights = training_blend(run)
    if not args.data_path or len(prefixes) < 2 or weights is not None:
        run.problems.append(
            "--mix computes the weights of --data-path, which must have several prefixes and no weights"
        )
        return ""
    if not total or not all(map(IndexedDataset.exists, prefixes)):
        return ""
    try:
        parts = mixed({prefix: num_tokens(prefix) for prefix in prefixes}, total, args.mix)
    except UserError as error:
        run.problems.append(f"--mix: {error}")
        return ""
    args.data_path = [word for prefix, part in parts.items() for word in (f"{part.weight:.6g}", prefix)]
    args.mix = None  # the weights are what is recorded
    return f"the corpora share {total:,} tokens:\n{share_table(parts.items(), 'corpus')}"


def _num_windows(prefix: str, length: int, shares_windows: bool) -> int | None:
    """The sequences that a corpus of conversations fills; None for another, or if one is too long, which is checked."""
    if not has_conversations(prefix):
        return None
    lengths = CorpusIndex.open(prefix).sequence_lengths
    return len(windows_of(lengths, length, shares_windows)[1]) - 1 if lengths.max(initial=0) <= length else None
