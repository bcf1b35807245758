"""Set aside a validation part of the training text, on which learning rates are chosen, and prompts to continue.

python -m examples.real_model.split --run runs/real-model

Reads RUN/corpus; writes RUN/text: train.LANG.jsonl, validation.LANG.jsonl and, of one held-out document each,
prompt.LANG.N.jsonl.
"""

from pathlib import Path

from examples.languages import LANGUAGES, held_out_files
from examples.real_model.arguments import parse
from examples.real_model.queue import PROMPTS
from examples.real_model.text import Facts
from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, refuse_existing

EVERY = 50  # documents; one of them is set aside
MOST = 24  # documents of the validation part, per language


def main() -> None:
    args = parse(__doc__.splitlines()[0])
    refuse_existing([args.run / "text"], args.overwrite)
    with atomic_directory(args.run / "text") as output:
        for language in LANGUAGES:
            split_training_text(args.run / "corpus" / f"train.{language}.jsonl", output, language)
        write_prompts(args.run / "corpus", output)


def split_training_text(source: Path, output: Path, language: str) -> None:
    """Every 50th document goes to the validation part, and to nothing else."""
    if not source.is_file():
        raise UserError(f"{source} is missing; make the text first")
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = set(range(0, len(lines), max(EVERY, len(lines) // MOST)))
    for name, wanted in (("validation", True), ("train", False)):
        text = "".join(line for number, line in enumerate(lines) if (number in chosen) == wanted)
        (output / f"{name}.{language}.jsonl").write_text(text, encoding="utf-8")


def write_prompts(corpus: Path, output: Path) -> None:
    """Documents of a language, from as many kinds as there are, one file each."""
    files = held_out_files(corpus, Facts.read(corpus).kinds)
    for language in LANGUAGES:
        by_kind = [
            path.read_text(encoding="utf-8").splitlines()
            for name, path in files.items()
            if name.startswith(f"{language}.")
        ]
        for number in range(PROMPTS):
            lines = by_kind[number % len(by_kind)]
            line = lines[min(number // len(by_kind) + len(lines) // 2, len(lines) - 1)]
            (output / f"prompt.{language}.{number + 1}.jsonl").write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
