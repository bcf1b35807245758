"""Stand-ins for files that a command line names and this machine lacks: a checkpoint's shape, corpora without text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from moelpr.base.run_folder import TRACKER_FILE
from moelpr.data.language_bits import LanguageBitsWriter, language_bits_path, loss_bits_path
from moelpr.model.checkpoints.chain import RELEASE
from moelpr.model.model_spec import FILE_NAME, ModelSpec
from moelpr.train.arguments.early import LENGTH_FLAGS
from moelpr.train.arguments.flags import split_by_flags, values_of

# Enough for every length of a run in epochs that a recipe has.
_STEPS = "1000000"


@dataclass
class StandIns:
    """The command line with what `folder` has in place of what is missing."""

    folder: Path
    argv: list[str]
    missing: list[str] = field(default_factory=list)  # names of what was replaced, to be said
    _names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, argv: list[str], folder: Path, spec: Callable[[], ModelSpec | None]) -> "StandIns":
        """Replace a checkpoint that is not there by the shape that `spec` returns, and corpora by empty ones."""
        made = cls(folder, list(argv))
        made._replace_checkpoint(spec)
        made._replace_corpora()
        made._replace_folders()
        return made

    def as_given(self, message: str) -> str:
        """A message about the stand-ins, about what the user named."""
        for name, given in self._names.items():
            message = message.replace(name, given)
        return message

    def _replace_checkpoint(self, spec: Callable[[], ModelSpec | None]) -> None:
        flag = "--pretrained-checkpoint"
        given = values_of(self.argv).get(flag)
        if given is None or (Path(given) / TRACKER_FILE).exists():
            return
        is_copied = (Path(given) / FILE_NAME).is_file()
        if (model := ModelSpec.read(Path(given)) if is_copied else spec()) is None:
            return  # the trainer says what is missing
        made = self.folder / "checkpoint"
        (made / RELEASE).mkdir(parents=True)
        (made / TRACKER_FILE).write_text(RELEASE)
        model.write(made)
        self._replace(flag, made, given)
        self.missing.append(f"the checkpoint {given}, of which only the shape is known")

    def _replace_folders(self) -> None:
        """Folders to write to, which a cluster may have elsewhere."""
        for flag in ("--save", "--data-cache-path"):
            given = values_of(self.argv).get(flag)
            if given is not None and not Path(given).exists():
                self._replace(flag, self.folder / flag[2:], given)
                self.missing.append(f"{flag} {given}")

    def _replace(self, flag: str, made: Path, given: str) -> None:
        _, self.argv = split_by_flags(self.argv, [flag])
        self.argv += [flag, str(made)]
        self._names[str(made)] = given

    def _replace_corpora(self) -> None:
        for flag, bits in (("--data-path", [0, 1]), ("--validation-data", [0])):
            words, others = split_by_flags(self.argv, [flag])
            self.argv = [*others, *(self._corpus(word, bits) for word in words)]
        lengths = {word.split("=")[0] for word in self.argv} & {*LENGTH_FLAGS}
        if any("corpus" in name for name in self.missing) and not lengths - {"--train-epochs"}:
            # Also if the recipe has them; the number of steps changes no step.
            _, self.argv = split_by_flags(self.argv, LENGTH_FLAGS)
            self.argv += ["--train-iters", _STEPS]

    def _corpus(self, word: str, bits: list[int]) -> str:
        """A word of --data-path or --validation-data, whose prefix exists."""
        language, equals, prefix = word.rpartition("=")
        is_weight = prefix.replace(".", "", 1).replace("e-", "", 1).isdigit()
        if prefix.startswith("--") or is_weight or IndexedDataset.exists(prefix):
            return word
        made = str(self.folder / f"corpus-{len(self.missing)}-")
        builder = IndexedDatasetBuilder(f"{made}.bin", dtype=np.int32)
        builder.add_document(np.zeros(len(bits) * 8, np.int32), [len(bits) * 8])
        builder.finalize(f"{made}.idx")
        is_of_conversations = len(bits) > 1 and values_of(self.argv).get("--stage") == "sft"
        for path in (language_bits_path(made), *([loss_bits_path(made)] if is_of_conversations else [])):
            with LanguageBitsWriter(path) as writer:
                writer.append(np.array(bits * 8, np.uint8))
                writer.finalize()
        self._names[made] = prefix
        self.missing.append(f"the corpus {prefix}")
        return f"{language}{equals}{made}"
