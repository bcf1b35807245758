"""Write an export as a GGUF file for llama.cpp, Ollama and LM Studio, also in fewer bits.

    moelpr model gguf EXPORT --quantize Q4_K_M --ollama
    moelpr model gguf EXPORT --quantize Q4_K_M --imatrix en=en.jsonl --imatrix el=el.jsonl

llama.cpp's own converter and quantizer write it (extra `gguf`). Before, the export is checked against what llama.cpp
computes, and after, its tokenizer against the export's. With --imatrix, rounding errors count as much as the weights
matter on this text: name all languages, because what it lacks is rounded as if it did not matter.
"""

from typing import Annotated

from checkpoint_convert.gguf import GgufFlags, gguf_folder
from moelpr.base.checksums import Verify, VerifyFlag
from moelpr.base.errors import UserError
from moelpr.base.settings import POSITIONAL, REPEATED, Folder, Source, metavar, run_script
from moelpr.measure.evaluate.settings import named_paths


class Settings(GgufFlags):
    export: Annotated[Source, POSITIONAL, metavar("EXPORT")]  # folder written by moelpr model export or graft
    save: Folder | None = None  # folder to write (default: EXPORT-gguf)
    imatrix: Annotated[list[str], REPEATED, metavar("LANG=FILE")] = []  # text to round for; repeat for all
    pre_tokenizer: str | None = None  # llama.cpp's pre-tokenizer, if its converter knows none, e.g. qwen2
    overwrite: bool = False  # replace existing GGUF files at --save
    verify: VerifyFlag = Verify.FULL  # do not compare files with the checksums in checksums.json

    def __post_init__(self) -> None:
        if self.imatrix and not self.quantize:
            raise UserError("--imatrix is for files in fewer bits; add --quantize")


def main(args: Settings) -> None:
    from checkpoint_convert.gguf.write import write_gguf
    from moelpr.data.text.reading import read_documents

    imatrix = {name: read_documents(path) for name, path in named_paths(args.imatrix, "--imatrix").items()}
    settings = args.quantize, args.ollama, imatrix, args.pre_tokenizer, args.overwrite, args.verify
    print(*write_gguf(args.export, args.save or gguf_folder(args.export), *settings), sep="\n")


if __name__ == "__main__":
    run_script(main)
