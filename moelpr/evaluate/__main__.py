"""Bits per byte of Hugging Face models on held-out text.

python -m moelpr.evaluate --model base=DIR --model stage2=DIR --data en=en.jsonl --data el=el.jsonl
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from moelpr.errors import UserError, run_command
from moelpr.files import atomic_file, refuse_existing


def main() -> None:
    if sys.argv[1:2] == ["report"]:
        raise UserError("the report is a command of its own: python -m moelpr.report RUN")
    _evaluate(sys.argv[1:])


def _evaluate(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moelpr.evaluate",
        description="Bits per byte of Hugging Face models per language, fewer is better; for MoE models also the share "
        "of first choices that go to the original experts.",
    )
    parser.add_argument(
        "--model", action="append", required=True, metavar="[NAME=]DIR", help="model directory; repeat it"
    )
    parser.add_argument("--data", action="append", required=True, metavar="LANG=FILE", help="JSON lines; repeat it")
    parser.add_argument(
        "--original-languages", metavar="en,es,...", help="adds the means of original and expanded languages"
    )
    parser.add_argument("--json-key", default="text", help='key of the text (default: "text")')
    parser.add_argument("--max-documents", type=int, metavar="N", help="documents per language (default: all)")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="window in tokens (default: 512, or what the models take)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a later window of a document sees again (default: a quarter)"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="full windows per batch (default: what fits in memory)"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto (default): float32 on a CPU, the checkpoint's own on a GPU",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="results as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace --output where it exists")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    models = {name: Path(path) for name, path in _named(args.model, "--model", default_name=True).items()}
    files = {language: Path(path) for language, path in _named(args.data, "--data").items()}
    original = [language.strip() for language in (args.original_languages or "").split(",") if language.strip()]
    if unknown := [language for language in original if language not in files]:
        raise UserError(f"--original-languages names {', '.join(unknown)}, for which there is no --data")
    if args.max_documents is not None and args.max_documents < 1:
        raise UserError(f"--max-documents {args.max_documents} leaves nothing to score; give at least 1")
    if args.output:
        refuse_existing([args.output], args.overwrite)

    from moelpr.evaluate.compare import (
        compare_models,
        group_means,
        markdown_table,
    )  # after the arguments: torch is slow
    from moelpr.evaluate.documents import read_documents
    from moelpr.evaluate.models import read_max_positions
    from moelpr.evaluate.perplexity import Settings

    settings = Settings(args.sequence_length, args.context, args.batch_size)
    settings = settings.resolve({name: read_max_positions(path) for name, path in models.items()})
    documents = {language: read_documents(path, args.json_key, args.max_documents) for language, path in files.items()}
    results = compare_models(models, documents, settings, device=args.device, dtype=args.dtype)

    means = {name: group_means(result.bits_per_byte, original) if original else {} for name, result in results.items()}
    print("Bits per byte (fewer is better)\n")
    print(markdown_table({name: result.bits_per_byte | means[name] for name, result in results.items()}))
    shares = {
        name: {language: share["overall"] for language, share in result.original_expert_share.items()}
        for name, result in results.items()
        if result.original_expert_share is not None
    }
    if shares:
        print("\nShare of first choices that are an original expert\n")
        print(markdown_table(shares))
    if args.output:
        content = {
            "settings": asdict(settings),
            "data": {language: str(path) for language, path in files.items()},
            "models": {
                name: {
                    "directory": str(models[name]),
                    "languages": {language: score.to_json() for language, score in result.scores.items()},
                    "means": means[name],
                }
                for name, result in results.items()
            },
        }
        with atomic_file(args.output) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _named(items: list[str], flag: str, default_name: bool = False) -> dict[str, str]:
    """`NAME=PATH` items as a dict; with `default_name` a bare path is named after its last folder."""
    named: dict[str, str] = {}
    for item in items:
        name, separator, path = item.partition("=")
        if not separator and default_name:
            name, path = Path(item).resolve().name, item
        if not name or not path:
            raise UserError(f"{flag} {item} is no NAME=PATH")
        if name in named:
            raise UserError(
                f"{flag} names {name} twice ({named[name]} and {path}); give each its own name as NAME=PATH"
            )
        named[name] = path
    return named


if __name__ == "__main__":
    run_command(main)
