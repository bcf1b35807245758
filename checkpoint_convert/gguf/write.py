"""Write an export as GGUF files, with Ollama's Modelfile."""

from collections.abc import Sequence
from pathlib import Path

from checkpoint_convert.card.readers import READERS
from checkpoint_convert.common.output_folder import check_output
from checkpoint_convert.compare.reader_requirements import unmet_requirements
from checkpoint_convert.gguf import llama_cpp
from checkpoint_convert.gguf.modelfile import modelfile
from checkpoint_convert.hf.companions import copy_card
from checkpoint_convert.hf.model_files import CARD_FILE
from moelpr.base.checksums import Verify
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, write_text
from moelpr.base.machine import format_bytes
from moelpr.base.model_code import refuse_code

MODELFILE = "Modelfile"
_READER = f"{READERS['llama.cpp']}: "


def write_gguf(
    folder: Path,
    save: Path,
    quantized: Sequence[str] = (),
    with_modelfile: bool = False,
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    verify: Verify = Verify.FULL,
) -> list[str]:
    """Write SAVE/NAME.gguf, and SAVE/NAME-TYPE.gguf for each of `quantized`; NAME is that of the export's folder.

    Args:
        quantized: Types of llama.cpp, such as Q4_K_M.

    Returns:
        A line for each file, and one about Ollama's template.

    Raises:
        UserError: llama.cpp cannot run the export, or a program is missing; `save` is then unchanged.
    """
    refuse_code(folder)
    if reasons := unmet_requirements(folder, "llama.cpp", verify):
        raise UserError(
            f"{folder} cannot become a GGUF file that computes the same model ({reasons[0].removeprefix(_READER)}); "
            "make it again with --as, such as --as granitemoe (moelpr model export or combine; docs/serving.md)"
        )
    name = folder.resolve().name
    check_output(save, [folder], overwrite, (f"{name}.gguf", MODELFILE))
    with atomic_directory(save) as partial:
        whole = partial / f"{name}.gguf"
        note = llama_cpp.convert(folder, whole, pre_tokenizer)
        files = [whole]
        for kind in quantized:
            files.append(partial / f"{name}-{kind}.gguf")
            llama_cpp.quantize(whole, files[-1], kind)
        lines = [f"{save / file.name}: {format_bytes(file.stat().st_size)}" for file in files]
        lines += [note] if note else []
        copy_card(folder, CARD_FILE, partial / CARD_FILE)
        if with_modelfile:
            text, note = modelfile(folder, files[min(1, len(quantized))].name)
            if text is not None:
                write_text(partial / MODELFILE, text)
            lines.append(f"{save / MODELFILE}: {note}" if text else note)
    return lines
