"""Held-out text while training, and what the early warnings look at."""

from collections.abc import Iterable
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset

from moelpr.arguments.checks.run import Run
from moelpr.data.language_bits import LanguageBits, language_bits_path
from moelpr.errors import UserError

# Megatron's own validation, which would not take place.
_MEGATRONS = ("valid_data_path", "full_validation", "multiple_validation_sets", "validation_set_names", "split")


def held_out_corpora_are_named_by_language(run: Run) -> Iterable[str]:
    seen = set()
    for item in run.args.validation_data or []:
        language, separator, prefix = item.partition("=")
        if not separator or not language or not prefix:
            yield f"--validation-data {item} is no LANG=PREFIX; write for example el=data/el-test_text_document"
        elif language in seen:
            yield f"--validation-data names {language} twice; give each language one corpus"
        seen.add(language)


def held_out_corpora_are_there_and_of_one_group(run: Run) -> Iterable[str]:
    for item in run.args.validation_data or []:
        prefix = item.partition("=")[2]
        if not prefix:
            continue  # another check's complaint
        if not IndexedDataset.exists(prefix):
            yield f"{prefix}.bin and .idx are not both there; build them with data_tools/preprocess_data.py"
            continue
        if not Path(language_bits_path(prefix)).exists():
            continue  # the dataset says so itself
        try:
            bits = LanguageBits(language_bits_path(prefix))
        except UserError as error:
            yield str(error)
            continue
        if len(bits) < 2:
            yield f"--validation-data {item} holds {len(bits)} tokens; give a corpus with text"
        elif 0 < bits.num_original < len(bits):
            yield (
                f"--validation-data {item} holds text of original and expanded languages; give each language a corpus "
                "of its own"
            )


def megatrons_validation_is_not_asked_for_too(run: Run) -> Iterable[str]:
    if not run.args.validation_data:
        return
    for name in _MEGATRONS:
        if name in run.typed and not (name == "split" and _holds_nothing_out(run.args.split)):
            yield (
                f"{run.typed[name]} and --validation-data both say what to validate on; keep --validation-data, which "
                "knows languages"
            )


def validation_is_counted_in_steps(run: Run) -> Iterable[str]:
    if run.args.validation_data and run.args.eval_interval is not None and run.args.eval_interval < 1:
        yield f"--eval-interval {run.args.eval_interval} must be at least 1"
    if run.args.validation_data and run.args.eval_iters is not None and run.args.eval_iters < 0:
        yield f"--eval-iters {run.args.eval_iters} must be at least 1, or 0 for all held-out text"
    if run.args.warn_window < 1:
        yield f"--warn-window {run.args.warn_window} must be at least 1"


def _holds_nothing_out(split: str | None) -> bool:
    return split is None or all(not float(share) for share in split.split(",")[1:])


CHECKS = (
    held_out_corpora_are_named_by_language,
    held_out_corpora_are_there_and_of_one_group,
    megatrons_validation_is_not_asked_for_too,
    validation_is_counted_in_steps,
)
