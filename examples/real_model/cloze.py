"""A multiple-choice cloze task from held-out text, for lm-evaluation-harness: how does this text go on?

    python -m examples.real_model.cloze --run runs/real-model
    python -m moelpr.evaluate harness --model base=runs/real-model/base-hf --tasks runs/real-model/cloze/tasks.yaml \\
        --include-path runs/real-model/cloze/tasks --languages en,es,zh,el,hu,tr --original-languages en,es,zh \\
        --output runs/real-model/evaluation

A question is the end of some paragraphs; the four options are the start of the next paragraph and of paragraphs of
three other documents of the same language and kind. All are cut at a word border, to similar lengths.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.demo_corpus import write_lines
from examples.languages import LANGUAGES
from examples.real_model.arguments import parse
from examples.real_model.text import TRAINED, UNTRAINED, hash_of
from moelpr.process.command import run_command
from moelpr.process.errors import UserError
from moelpr.store.files import atomic_directory
from moelpr.store.yaml_files import dump

QUESTIONS = 250  # per task; a language has one task of kinds that are trained on, and one of the other
PER_DOCUMENT = 6  # questions, at most
CONTEXT = 100  # characters, at most; in Chinese a third
OPTION = (30, 45)  # characters, at least and at most; in Chinese a third
NUM_OPTIONS = 4
METRICS = ("acc", "acc_norm")  # acc_norm divides by the length of the option
# Benchmark -> the end of its tasks' names, kinds of text
BENCHMARKS = {"Cloze, trained kinds": ("trained", TRAINED), "Cloze, other kinds": ("other", UNTRAINED)}


def write_tasks(output: Path, corpus: Path, *, overwrite: bool = False) -> None:
    """Write `tasks.yaml` for --tasks and the folder `tasks` for --include-path, unless `output` exists.

    Args:
        overwrite: Replace an existing `output`.

    Raises:
        UserError: the corpus is missing, or too small.
    """
    if output.exists() and not overwrite:
        return
    table: dict[str, Any] = {
        name: {"num_fewshot": 0, "metric": "acc_norm", "tasks": {lang: f"cloze_{end}_{lang}" for lang in LANGUAGES}}
        for name, (end, _) in BENCHMARKS.items()
    }
    with atomic_directory(output) as folder:
        (folder / "tasks").mkdir()
        for language in LANGUAGES:
            path = corpus / f"unseen.{language}.jsonl"
            if not path.exists():
                raise UserError(f"{path} is missing; run make results first")
            documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for end, kinds in BENCHMARKS.values():
                name = f"cloze_{end}_{language}"
                most = QUESTIONS // len(kinds)
                chosen = [question for kind in kinds for question in questions_of(documents, kind, language)[:most]]
                if not chosen:
                    raise UserError(f"{path} has too few documents for a question; make the text again")
                data = folder / "tasks" / f"{name}.jsonl"
                write_lines(data, chosen)
                task = task_of(name, output / "tasks" / data.name)
                data.with_suffix(".yaml").write_text(dump(task), encoding="utf-8")
        (folder / "tasks.yaml").write_text(dump(table), encoding="utf-8")


def task_of(name: str, data: Path) -> dict[str, Any]:
    """The harness's description of a task."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "\n",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
    }


def questions_of(documents: Sequence[dict[str, str]], kind: str, language: str) -> list[dict[str, Any]]:
    """The questions that the documents of a kind allow, in the order of a hash.

    Hashes also choose the other options and the place of the right one.

    Args:
        documents: with the keys text, id and kind.
    """
    scale = 3 if language == "zh" else 1
    low, high = (length // scale for length in OPTION)
    found: list[tuple[str, str, str, str]] = []  # ID, document, context, right option
    for document in documents:
        paragraphs = document["text"].split("\n") if document["kind"] == kind else []
        for place in range(1, len(paragraphs)):
            option = cut(paragraphs[place], high)
            if low <= len(option) < len(paragraphs[place]):  # whole paragraphs would differ from cut ones
                context = cut("\n".join(paragraphs[:place])[::-1], CONTEXT // scale)[::-1]
                found.append((f"{document['id']} {place}", document["id"], context, option))
    found.sort(key=lambda question: hash_of(question[0]))
    asked: Counter[str] = Counter()
    questions = []
    for number, (name, document_id, context, option) in enumerate(found):
        others: dict[str, str] = {}  # document -> wrong option
        for _, other, _, text in found[number + 1 :] + found[:number]:
            if len(others) < NUM_OPTIONS - 1 and other not in (document_id, *others):
                others |= {other: text} if text not in (option, *others.values()) else {}
        if len(others) == NUM_OPTIONS - 1 and asked[document_id] < PER_DOCUMENT:
            asked[document_id] += 1
            options, answer = [*others.values()], hash_of(f"{name} answer") % NUM_OPTIONS
            options.insert(answer, option)
            questions.append({"id": name, "context": context, "options": options, "answer": answer})
    return questions


def cut(text: str, length: int) -> str:
    """The longest start of a text with at most `length` characters that ends at a word border."""
    if len(text) <= length or " " not in text[: length + 1]:
        return text[:length]
    return text[: length + 1].rpartition(" ")[0]


def main() -> None:
    args = parse(__doc__.splitlines()[0])
    write_tasks(args.run / "cloze", args.run / "corpus", overwrite=args.overwrite)


if __name__ == "__main__":
    run_command(main)
