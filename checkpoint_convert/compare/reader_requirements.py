"""Check an export against what a program that is to run it requires, without the program."""

from pathlib import Path

from checkpoint_convert.card.readers import READERS, obstacle
from checkpoint_convert.hf.checks import check_weights
from checkpoint_convert.hf.model_files import has_tokenizer
from checkpoint_convert.hf.safetensors_reader import HfReader
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.model.families.families import read_base
from moelpr.model.families.hf_config import read_config
from moelpr.model.families.tables import pieces, zeros

# Keys that transformers 5 has renamed. It writes only the new names if it saves the model, MLX reads only the old ones.
_RENAMED = ("rope_theta", "rope_scaling", "num_experts")


def unmet_requirements(folder: Path, reader: str, verify: Verify = Verify.FULL) -> list[str]:
    """Return the reasons why the reader does not run the model in `folder` as transformers does.

    Args:
        reader: A key of READERS.

    Raises:
        UserError: `folder` contains no model of a supported class.
    """
    config = read_config(folder)
    family, spec = read_base(folder)
    reasons = []
    # The names that our exports have, which a program that saved the model since may have changed.
    complete = family.export_config(config, spec, "float32")
    if (reason := obstacle(reader, complete)) is not None:
        reasons.append(f"{READERS[reader]}: {reason}")
    if reader == "mlx":
        reasons += [
            f"config.json must have {key}: {complete[key]}, got {config.get(key)}"
            for key in _RENAMED
            if complete.get(key) != config.get(key)
        ]
    if reader != "transformers" and not has_tokenizer(folder):
        reasons.append("there is no tokenizer")
    try:
        weights = HfReader(folder, verify=verify)
        check_weights(weights, family, spec, list(pieces(family.table, spec)))
        reasons += [f"there is no {name}" for name, _ in zeros(family.table, spec) if name not in weights]
    except UserError as error:
        reasons.append(str(error))
    return reasons
