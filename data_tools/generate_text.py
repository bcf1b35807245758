r"""Let a base model write text by itself, as replay for those who have none of what it was trained on.

    moelpr data generate --model Qwen3-8B-Base --output data/generated --documents 20000 --language-id glotlid.bin

The texts begin with the model's start token, or with short prompts in many languages and in code (--languages,
--prompts). They are written to OUTPUT/LANGUAGE.jsonl, the text of original languages for languages.yaml or moelpr
preprocess, each with its language and prompt; texts that were written before are left out. generated.manifest.json has
the settings. An interrupted command goes on when it is run again.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from data_tools.generation.sampling import CODE, OWN_CHOICE, PROMPTS, GeneratedText, generate, read_prompts, writer
from moelpr.languages import canonical, language_name
from moelpr.process.command import CommandParser, run_command
from moelpr.process.errors import UserError
from moelpr.process.text_tables import table_text
from moelpr.process.versions import installed_versions
from moelpr.store.files import refuse_existing
from moelpr.store.journal import resumable_directory


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    refuse_existing([arguments.output], arguments.overwrite)
    languages = [name.strip() for name in (arguments.languages or "").split(",") if name.strip()]
    codes = [name if name in (CODE, OWN_CHOICE) else canonical(name) for name in languages]
    prompts = read_prompts(arguments.prompts, codes)
    language_of = None
    if arguments.language_id:
        from moelpr.text.language_id import load_identifier

        language_of = load_identifier(arguments.language_id, frozenset(), arguments.min_confidence).language
    from moelpr.evaluate.models import check_device, load_model, read_max_positions, require_hf

    require_hf({str(arguments.model): arguments.model}, "moelpr data generate")
    check_device(arguments.device)
    most = read_max_positions(arguments.model)
    if most is not None and arguments.max_tokens >= most:
        raise UserError(f"--max-tokens must be below the model's {most:,} positions, got {arguments.max_tokens:,}")
    loaded = load_model(arguments.model, arguments.device, arguments.dtype)
    how = ("model", "output", "overwrite", "debug")
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items() if name not in how}
    settings["prompts"] = prompts
    sampled = arguments.batch_size, arguments.max_tokens, arguments.temperature, arguments.top_p
    with resumable_directory(arguments.output, [str(arguments.model.resolve()), settings]) as journal:
        write, amounts = writer(loaded, *sampled), (arguments.documents, arguments.min_tokens, arguments.seed)
        with tqdm(total=arguments.documents, unit="document", disable=None) as bar:
            for done in generate(journal, prompts, write, language_of, *amounts):
                bar.update(sum(done.documents.values()) - bar.n)
        counts = done.documents, done.repeated, done.short
        record = GeneratedText(str(arguments.model), settings, *counts, installed_versions())
        if not record.documents:
            raise UserError(
                f"{arguments.model} writes nothing new of {arguments.min_tokens} tokens or more; lower --min-tokens, "
                "or check the model"
            )
        record.write(journal.folder)
    print_summary(record, arguments.documents)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder of the base model")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder to make, with a file per language")
    add("--overwrite", action="store_true", help="replace an existing folder")
    add("--documents", type=int, default=10_000, metavar="N", help="texts to write (default: 10000)")
    which = "languages of the prompts, code for code, und for the start token alone (default: all in --prompts)"
    add("--languages", metavar="A,B", help=which)
    what = "YAML file of beginnings, language: [text, …] (default: those of moelpr)"
    add("--prompts", type=Path, default=PROMPTS, metavar="FILE", help=what)
    add("--temperature", type=float, default=1.0, metavar="T", help="of the sampling (default: 1)")
    add("--top-p", type=float, default=0.95, metavar="P", help="probability to sample from (default: 0.95)")
    add("--max-tokens", type=int, default=512, metavar="N", help="tokens of a text (default: 512)")
    add("--min-tokens", type=int, default=32, metavar="N", help="leave out shorter texts (default: 32)")
    model = "identify languages by py3langid or a fastText model, the path of its file (default: the prompt's language)"
    add("--language-id", metavar="MODEL", help=model)
    confidence = "probability below which a language is uncertain, und (default: 0.5)"
    add("--min-confidence", type=float, default=0.5, metavar="X", help=confidence)
    add("--batch-size", type=int, default=32, metavar="N", help="texts at a time, of one prompt (default: 32)")
    add("--seed", type=int, default=1234, metavar="N", help="random seed (default: 1234)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="of the weights (default: auto, float32 on a CPU)")
    arguments = parser.parse_args(argv)
    for name in ("documents", "max_tokens", "min_tokens", "batch_size"):
        if (value := getattr(arguments, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.min_tokens > arguments.max_tokens:
        raise UserError(f"--min-tokens {arguments.min_tokens} is above --max-tokens {arguments.max_tokens}")
    if not 0 < arguments.temperature <= 10:
        raise UserError(f"--temperature must be above 0 and at most 10, got {arguments.temperature:g}")
    if not 0 < arguments.top_p <= 1 or not 0 <= arguments.min_confidence <= 1:
        raise UserError("--top-p and --min-confidence must be from 0 to 1, and --top-p above 0")
    if not arguments.model.is_dir():
        raise UserError(f"there is no folder {arguments.model}; pass a Hugging Face model as --model")
    return arguments


def print_summary(record: GeneratedText, wanted: int) -> None:
    rows = [
        [name if name in (CODE, OWN_CHOICE) else f"{name} {language_name(name)}", f"{number:,}"]
        for name, number in sorted(record.documents.items(), key=lambda item: -item[1])
    ]
    print(table_text(["language", "documents"], rows, indent="  "))
    print(f"left out: {record.repeated:,} written before, {record.short:,} short")
    if (total := sum(record.documents.values())) < wanted:
        print(f"note: only {total:,} texts, as the model writes nothing new; raise --temperature, or add prompts")


if __name__ == "__main__":
    run_command(main)
