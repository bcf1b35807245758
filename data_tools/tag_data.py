"""Add language bits and a manifest to a corpus that Megatron's own tool has tokenized, without copying its tokens.

    moelpr data tag data/el_text_document --language el --expanded-languages el \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen1.5-1.8B
    moelpr data tag data/mixed_text_document --document-languages languages.txt --original-languages en,es,zh \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen1.5-1.8B --output-prefix tagged/mixed

The .bin and .idx are read completely and stay as they are. The .lang and the manifest are written next to them, or
with --output-prefix elsewhere, next to links to them. The tokenizer must fit: its vocabulary, the tokens that it puts
around a text, and the end-of-document token.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

from data_tools.corpus.corpus import CorpusPaths, describe
from data_tools.corpus.corpus_writer import check_output, commit_corpus, remove_leftover
from data_tools.preprocessing.arguments import GROUPS, KEPT, add_tokenizer_arguments
from data_tools.preprocessing.job_tokenizer import JobTokenizer, load_job_tokenizer
from data_tools.preprocessing.tagging import LanguageGroups
from data_tools.tagging.languages import languages_in, write_bits
from data_tools.tagging.tokens import check_begins, check_dtype, check_ends, read_tokens, reproduced
from moelpr.base.command import CommandParser, check_is_utf8, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import empty, fsync_file, locked_folder, refuse_existing
from moelpr.base.journal import partial_name
from moelpr.base.languages import canonical, is_code
from moelpr.base.text_tables import table_text
from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.manifest import FileRecord, LanguageCount, Manifest, Source


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    prefix, output, overwrite = arguments.prefix, arguments.output_prefix or arguments.prefix, arguments.overwrite
    index = CorpusIndex.open(prefix)
    documents = len(index.document_starts) - 1
    groups, languages, source = languages_of(arguments, documents)
    if not index.num_tokens:
        raise UserError(f"{prefix} contains no tokens; nothing was written")
    check_place(arguments)
    tokenizer = tokenizer_of(arguments)
    check_dtype(prefix, index, tokenizer)
    with unfinished_folder(output, outputs_of(arguments), overwrite) as folder:
        paths, unfinished = CorpusPaths.of(prefix), CorpusPaths.of(folder / Path(output).name)
        counts = write_bits(unfinished.lang, index, languages, groups, source)
        check_originals(arguments, groups, counts)
        found = read_tokens(prefix, index, tokenizer)
        check_begins(prefix, found, tokenizer)
        if arguments.append_eod:
            check_ends(prefix, found, tokenizer)
        fsync_file(unfinished.lang)
        files = {"bin": found.record, "idx": FileRecord.of(paths.idx), "lang": FileRecord.of(unfinished.lang)}
        manifest = Manifest(
            tokenizer=tokenizer.record,
            append_eod=arguments.append_eod,
            sources=[Source(str(paths.bin), found.record.bytes, None, documents)],
            languages=counts,
            documents=documents,
            tokens=index.num_tokens,
            skipped_lines=0,
            files=files,
        )
        if arguments.output_prefix:
            for path, link in ((paths.bin, unfinished.bin), (paths.idx, unfinished.idx)):
                link.symlink_to(os.path.realpath(path))
        commit_corpus(output, folder, manifest)
    original = sum(count.tokens for count in counts.values() if count.bit == "original")
    print(describe(output, documents, index.num_tokens, original, index.dtype))
    print_findings(arguments, counts, tokenizer, int(found.lasts.sum()), int(found.lasts[tokenizer.record.eod_id or 0]))
    same, tried = reproduced(prefix, index, tokenizer)
    if 2 * same < tried:
        print(
            f"warning: only {same} of the first {tried} texts give the same tokens when {arguments.tokenizer_model} "
            "tokenizes them again; check that the corpus was made with this tokenizer",
            file=sys.stderr,
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="path of the corpus without .bin or .idx")
    place = "write P.lang and P.manifest.json, and P.bin and P.idx as links (default: write next to the corpus)"
    add("--output-prefix", metavar="P", help=place)
    add("--overwrite", action="store_true", help="replace existing language bits, or an existing corpus P")
    add = add_tokenizer_arguments(parser, required=True).add_argument
    ends = "whether each document ends with the end-of-document token, which is checked (default: it does)"
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True, help=ends)
    add("--eod-token", metavar="TOKEN", help="that token, such as '<|endoftext|>' (default: the tokenizer's)")
    group = parser.add_argument_group("language bit")
    add, add_language = group.add_argument, group.add_mutually_exclusive_group(required=True).add_argument
    one = "language of all documents, such as eu with --expanded-languages eu; or their group: original, expanded"
    add_language("--language", metavar="CODE", help=one)
    each = "file with the language of each document, one code per line, in the documents' order"
    add_language("--document-languages", metavar="FILE", help=each)
    add("--original-languages", metavar="A,B", help="languages whose bit is original")
    add("--expanded-languages", metavar="C,D", help="expanded languages; any other is an error (default: all others)")
    arguments = parser.parse_args(argv)
    for suffix in (".bin", ".idx"):
        arguments.prefix = arguments.prefix.removesuffix(suffix)
    return arguments


def languages_of(arguments: argparse.Namespace, documents: int) -> tuple[LanguageGroups, Iterator[str], str]:
    """Return the groups of languages, the language of each document, and where it is stated."""
    language, file = arguments.language, arguments.document_languages
    named = arguments.original_languages or arguments.expanded_languages
    if language in GROUPS:
        if named:
            raise UserError(
                f"--language {language} excludes --original-languages and --expanded-languages; pass a code instead"
            )
        return (
            LanguageGroups(frozenset({"original", KEPT}), frozenset({"expanded"})),
            repeat(language, documents),
            "--language",
        )
    if not named or (file and not arguments.original_languages):
        flag = "--document-languages" if file else f"--language {language}"
        raise UserError(f"{flag} requires --original-languages, such as --original-languages en,es,zh")
    groups = LanguageGroups.from_names(arguments.original_languages, arguments.expanded_languages)
    if file:
        return groups, languages_in(file, groups), str(file)
    if not is_code(language):
        raise UserError(f"--language must be original, expanded or a code such as eu or eus_Latn, got {language}")
    code = canonical(language)
    if code not in groups.original | groups.expanded and (groups.expanded or not groups.original):
        raise UserError(
            f"--language {language} is neither in --original-languages nor in --expanded-languages; add it "
            "to one of them"
        )
    return groups, repeat(code, documents), "--language"


def check_originals(arguments: argparse.Namespace, groups: LanguageGroups, counts: dict[str, LanguageCount]) -> None:
    """Raise `UserError` if an original language does not occur: after a typo, its documents would be expanded."""
    missing = groups.original - counts.keys()
    if missing and arguments.document_languages and not arguments.expanded_languages:
        raise UserError(
            f"no document has the language {', '.join(sorted(missing))} of --original-languages; found: "
            f"{', '.join(sorted(counts))}; correct the name or remove it; nothing was written"
        )


def outputs_of(arguments: argparse.Namespace) -> list[Path]:
    """The files that must not exist; those of the corpus itself stay."""
    return (
        [*CorpusPaths.of(arguments.output_prefix)]
        if arguments.output_prefix
        else [CorpusPaths.of(arguments.prefix).lang]
    )


def check_place(arguments: argparse.Namespace) -> None:
    """Raise `UserError` if the output exists, or would replace what is read."""
    prefix, output = arguments.prefix, arguments.output_prefix
    if output:
        # A link would replace the file that it leads to.
        if any(os.path.realpath(path) == place_of(f"{output}{path.suffix}") for path in CorpusPaths.of(prefix)[:2]):
            raise UserError(f"--output-prefix {output} is the corpus itself; omit it to write next to the corpus")
        check_output(output, arguments.overwrite)
    elif CorpusPaths.of(prefix).lang.exists() and not arguments.overwrite:
        remove_leftover(prefix)
        raise UserError(f"{prefix} has language bits already; pass --overwrite to replace them")


def place_of(path: str) -> str:
    """Return where a file is, not where it leads to if it is a link."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def tokenizer_of(arguments: argparse.Namespace) -> JobTokenizer:
    check_is_utf8(arguments.tokenizer_model, "tokenizer")
    special_tokens = not arguments.tokenizer_hf_no_include_special_tokens
    model = arguments.tokenizer_model
    tokenizer = load_job_tokenizer(arguments.tokenizer_type, model, special_tokens, arguments.eod_token)
    if arguments.append_eod and tokenizer.record.eod_id is None:
        raise UserError(
            f"{model} has no end-of-document token; name one with --eod-token, or pass --no-append-eod if the corpus "
            "was made without"
        )
    return tokenizer


@contextmanager
def unfinished_folder(prefix: str, outputs: list[Path], overwrite: bool) -> Iterator[Path]:
    """Yield a locked folder for unfinished files, and remove it in the end."""
    folder = partial_name(Path(prefix))
    with locked_folder(folder, prefix):
        try:
            refuse_existing(outputs, overwrite)  # again: another process may just have ended
            empty(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def print_findings(
    arguments: argparse.Namespace, counts: dict[str, LanguageCount], tokenizer: JobTokenizer, total: int, ended: int
) -> None:
    """Print the counts by language, and how documents end."""
    if arguments.document_languages:
        rows = [[name, count.bit, f"{count.documents:,}", f"{count.tokens:,}"] for name, count in counts.items()]
        print(f"\n{table_text(['language', 'bit', 'documents', 'tokens'], rows, (0, 1), indent='  ')}\n")
    if arguments.append_eod:
        print(f"every document ends with token {tokenizer.record.eod_id}; the tokenizer fits")
    elif tokenizer.record.eod_id is not None:
        print(f"{ended:,} of {total:,} documents end with token {tokenizer.record.eod_id}; the tokenizer fits")


if __name__ == "__main__":
    run_command(main)
