"""Write an export as a GGUF file for llama.cpp, Ollama and LM Studio, also in fewer bits.

    moelpr model gguf EXPORT --quantize Q4_K_M --ollama

llama.cpp's own converter and quantizer write it (extra `gguf`). Before, the export is checked against what llama.cpp
computes, and after, its tokenizer against the export's.
"""

from typing import Annotated

from checkpoint_convert.gguf import GgufFlags, gguf_folder
from moelpr.base.checksums import Verify, VerifyFlag
from moelpr.base.settings import POSITIONAL, Folder, Source, metavar, run_script


class Settings(GgufFlags):
    export: Annotated[Source, POSITIONAL, metavar("EXPORT")]  # folder written by moelpr model export or graft
    save: Folder | None = None  # folder to write (default: EXPORT-gguf)
    pre_tokenizer: str | None = None  # llama.cpp's pre-tokenizer, if its converter knows none, e.g. qwen2
    overwrite: bool = False  # replace existing GGUF files at --save
    verify: VerifyFlag = Verify.FULL  # do not compare files with the checksums in checksums.json


def main(args: Settings) -> None:
    from checkpoint_convert.gguf.write import write_gguf

    settings = args.quantize, args.ollama, args.pre_tokenizer, args.overwrite, args.verify
    print(*write_gguf(args.export, args.save or gguf_folder(args.export), *settings), sep="\n")


if __name__ == "__main__":
    run_script(main)
