"""Write an export as a GGUF file for llama.cpp, Ollama and LM Studio, also in fewer bits.

    moelpr model gguf EXPORT --quantize Q4_K_M --ollama

llama.cpp's own converter and quantizer write it (extra `gguf`). Before, the export is checked against what llama.cpp
computes, and after, its tokenizer against the export's.
"""

from typing import Annotated, Literal

from moelpr.base.checksums import Verify, VerifyFlag
from moelpr.base.settings import POSITIONAL, Flags, Folder, metavar, run_script
from moelpr.measure.evaluate.settings import HfFolder

Type = Literal["Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K"]


class Settings(Flags):
    export: Annotated[HfFolder, POSITIONAL, metavar("EXPORT")]  # folder written by moelpr model export or graft
    quantize: list[Type] = []  # also write the file in fewer bits
    ollama: bool = False  # also write Ollama's Modelfile, with the chat template and its stops
    save: Folder | None = None  # folder to write (default: EXPORT-gguf)
    pre_tokenizer: str | None = None  # llama.cpp's pre-tokenizer, if its converter knows none, e.g. qwen2
    overwrite: bool = False  # replace existing GGUF files at --save
    verify: VerifyFlag = Verify.FULL  # do not compare files with the checksums in checksums.json


def main(args: Settings) -> None:
    from checkpoint_convert.gguf.write import write_gguf

    save = args.save or args.export.with_name(f"{args.export.name}-gguf")
    settings = args.quantize, args.ollama, args.pre_tokenizer, args.overwrite, args.verify
    print(*write_gguf(args.export, save, *settings), sep="\n")


if __name__ == "__main__":
    run_script(main)
