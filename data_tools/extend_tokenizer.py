"""Extend a tokenizer by tokens for new languages: continue its merges on their text.

The old tokens keep their IDs. Original-language text is tokenized as before: a merge that would change a document of
--original is refused. Byte-level BPE (Qwen, Llama 3) and SentencePiece BPE with byte fallback (Llama 2, Mistral) are
supported; the result is a Hugging Face fast tokenizer with vocabulary_extension.json, for `moelpr model convert
--extended-tokenizer`. docs/vocabulary.md has examples.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

from data_tools.preprocessing.job_tokenizer import load_job_tokenizer
from data_tools.vocabulary.bpe_tokenizer import BpeTokenizer
from data_tools.vocabulary.counting import Comparison, TextFiles, compare, count_words, find_uses
from data_tools.vocabulary.extension import OriginalTextGuard, choose_tokens, load_extended, write_tokenizer
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, refuse_existing
from moelpr.base.languages import canonical
from moelpr.base.machine import available_cpus
from moelpr.base.settings import Count, Flags, Folder, Share, metavar, number, run_script
from moelpr.base.text_tables import table_text
from moelpr.data.text.sources import STANDARD_INPUT, download, find_files, open_source


class Settings(Flags):
    tokenizer: Folder  # folder of the tokenizer to extend
    # text of expanded languages: JSON lines or Parquet; a file, folder or pattern
    input: Annotated[list[str], metavar("LANG=FILE")]
    # text that must stay tokenized as it is; the more, the safer is other text
    original: Annotated[list[str], metavar("LANG=FILE")]
    num_new_tokens: Count  # number of tokens to add
    save: Folder  # folder to write the extended tokenizer to
    max_changed_share: Share = 0.0  # fraction of the original documents that may be tokenized differently
    held_out_share: Annotated[float, number(float, above=0, below=1)] = 0.05  # fraction to measure on, not learn from
    json_key: str = "text"  # JSON key of the text
    workers: Count = available_cpus()  # worker processes (default: one per core)
    overwrite: bool = False  # replace an existing folder --save

    def __post_init__(self) -> None:
        if not self.tokenizer.is_dir():
            raise UserError(f"--tokenizer {self.tokenizer} is not a folder; pass one with tokenizer.json")
        if self.save.resolve() == self.tokenizer.resolve():
            raise UserError("--save is the folder of --tokenizer, which would be replaced; choose another")
        refuse_existing([self.save], self.overwrite)


def main(args: Settings) -> None:
    new_files = text_files(args.input, args, "--input")
    original_files = text_files(args.original, args, "--original")
    if both := set(new_files.languages) & set(original_files.languages):
        raise UserError(f"--input and --original both have {', '.join(sorted(both))}; a language is one or the other")
    old = load_job_tokenizer("HuggingFaceTokenizer", str(args.tokenizer), False, None)
    if not isinstance(old.tokenizer.source, str):
        raise UserError(f"the tokenizer {args.tokenizer} has no tokenizer.json; convert it to a fast tokenizer")
    bpe = BpeTokenizer(old.tokenizer.source, str(args.tokenizer))
    counted = dict(zip(new_files.languages, count_words(new_files, bpe, args.workers), strict=True))
    for language, text in counted.items():
        if not text.bytes or not text.held_out:
            raise UserError(
                f"--input {language} has too little text to learn from and to hold out documents from; add documents"
            )
    uses = find_uses(original_files, bpe, old.tokenizer, args.workers)
    guard = OriginalTextGuard(bpe.first_new_id, *uses, args.max_changed_share)
    new = choose_tokens(bpe, counted, args.num_new_tokens, guard)
    with atomic_directory(args.save) as folder:
        notes = write_tokenizer(folder, args.tokenizer, old, bpe, new)
        extended = load_extended(folder, bpe.extended(new))
        expanded = compare(new_files, old.tokenizer, extended.tokenizer, True, args.workers)
        original = compare(original_files, old.tokenizer, extended.tokenizer, False, args.workers)
        print_comparison("expanded, held out", new_files.languages, expanded)
        print_comparison("original", original_files.languages, original)
        changed, documents = (sum(getattr(part, name) for part in original) for name in ("changed", "documents"))
        print(f"\noriginal text: {changed:,} of {documents:,} documents are tokenized differently")
        print(
            f"other original text, estimated: merges found without the {uses[1].documents:,} held-out documents would "
            f"change {guard.unforeseen:,} of them (refused too)"
        )
        if changed > args.max_changed_share * documents:
            raise UserError(
                f"{changed:,} of {documents:,} original documents would be tokenized differently, more than "
                f"--max-changed-share {args.max_changed_share:g}; nothing was written"
            )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    last = bpe.first_new_id + len(new) - 1
    print(f"wrote {args.save} with {len(new):,} new tokens, IDs {bpe.first_new_id:,} to {last:,}")


def text_files(items: Sequence[str], args: Settings, flag: str) -> TextFiles:
    """Return the files of LANG=FILE arguments."""
    languages: list[str] = []
    sources = []
    for item in items:
        language, _, path = item.partition("=")
        if not language or not path:
            raise UserError(f"{flag} must be LANG=FILE, such as el=el.jsonl, got {item}")
        if path == STANDARD_INPUT:
            raise UserError(f"{flag} is read twice, so it can't be standard input; write it to a file first")
        language = canonical(language)
        if language not in languages:
            languages.append(language)
        sources += [open_source(file, languages.index(language)) for file in find_files([path])]
    return TextFiles(languages, download(sources), args.json_key, args.held_out_share)


def print_comparison(title: str, languages: list[str], compared: list[Comparison]) -> None:
    rows = []
    for language, comparison in zip(languages, compared, strict=True):
        before, after = (comparison.bytes / max(tokens, 1) for tokens in (comparison.before, comparison.after))
        numbers = f"{before:.3f}", f"{after:.3f}", f"{after / max(before, 1e-9):.2f}"
        rows.append([language, f"{comparison.documents:,}", f"{comparison.bytes:,}", *numbers])
    head = [title, "documents", "bytes", "bytes per token: before", "after", "ratio"]
    print(f"\n{table_text(head, rows, indent='  ')}")


if __name__ == "__main__":
    run_script(main)
