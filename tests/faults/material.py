"""The inputs of the cases: a tiny model, text, and the results of the commands on them, undisturbed."""

import bz2
import gzip
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.faults.commands import COMMANDS, fill, run
from tests.faults.processes import Failure

WORDS = {
    "en": "the door is open and somebody comes home late in the morning with a light on every day".split(),
    "el": "η πόρτα είναι ανοιχτή και κάποιος γυρίζει αργά στο σπίτι με το φως κάθε πρωί".split(),
}
RECIPE = """\
# Two steps of a tiny model.
micro-batch-size: 2
global-batch-size: 4
seq-length: 32
lr: 1.0e-2
min-lr: 1.0e-3
lr-decay-style: cosine
lr-warmup-iters: 1
train-iters: 2
save-interval: 1
log-interval: 1
"""
PROJECT = """\
model: hf
output: project
budget: {epochs: 1}
method: moe-lpr
languages:
  expanded: {el: {text: text/el.jsonl, held_out: text/held-out.el.jsonl}}
  original: {en: {text: text/en.jsonl, held_out: text/held-out.en.jsonl}}
"""
FINISHED = (
    PROJECT.replace("{epochs: 1}", "{tokens: 640}")
    + """\
hardware: none
steps: {stage1: &short {global-batch-size: 2, seq-length: 64, micro-batch-size: 1}, stage2: *short}
"""
)
TEMPLATE = """\
{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
UNDISTURBED = "undisturbed"  # folder of the material: per command, its box and what it printed


def make(folder: Path) -> None:
    """Write all material to `folder`."""
    in_child(lambda: write_sources(folder))
    for name, source, target in (
        *((f"corpus of {language}", ".", "corpus") for language in WORDS),
        ("convert", "checkpoint", "checkpoint"),
        ("export", "hf", "export"),
        ("train", "run", "stage1"),
        ("pack", "pack", "pack"),
        ("kept sums", "kept", "kept"),
        ("preprocess a large file", ".", "large"),
    ):
        box = undisturbed(name, folder)
        shutil.copytree(box / "out" / source, folder / target, symlinks=True, dirs_exist_ok=True)
    half_a_run(folder / "stage1", folder / "half")
    in_child(lambda: finish_project(folder))
    (folder / "evaluation").mkdir()
    first = undisturbed("evaluate again", folder)
    shutil.rmtree(folder / "evaluation")
    shutil.copytree(first / "out/evaluation", folder / "evaluation")
    shutil.rmtree(first.parent)


def in_child(call: Callable[[], None]) -> None:
    """Call it in a fork, as it starts threads that later forks of this process would lack."""
    if (pid := os.fork()) == 0:
        try:
            call()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise Failure("the material can't be made")


def undisturbed(name: str, folder: Path) -> Path:
    """The box of a command that ran without any fault; it is run once, by the case that needs it first."""
    box = folder / UNDISTURBED / name / "box"
    box.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(box.with_name("lock")):
        if not box.with_name("seconds").exists():
            shutil.rmtree(box, ignore_errors=True)
            fill(box, COMMANDS[name], folder)
            started = time.monotonic()
            ended = run(COMMANDS[name], box)
            if ended.code:
                raise Failure(f"{name} fails without any fault:\n{ended.last_words()}")
            box.with_name("seconds").write_text(str(time.monotonic() - started))
    return box


def seconds(name: str, folder: Path) -> float:
    """The time that a command takes without any fault."""
    return float((folder / UNDISTURBED / name / "seconds").read_text())


def write_sources(folder: Path) -> None:
    """The model and the text."""
    from safetensors.torch import load_file, save_file

    from benchmarks.common import qwen2_config, save_random_model
    from tests.support.hf_models import save_extended_tokenizer

    write_text(folder)
    tokenizer = byte_level_tokenizer(folder)
    config = qwen2_config(2, 32, 48, len(tokenizer), 64, tie_word_embeddings=True)
    tokenizer.save_pretrained(save_random_model(config, folder / "hf"))
    (folder / "hf" / "README.md").write_text("---\nlicense: mit\n---\n\n# A base\n")
    shutil.copytree(folder / "hf", folder / "expert")
    weights = load_file(folder / "hf/model.safetensors")
    learned = {name: 1.5 * one if ".mlp." in name else one for name, one in weights.items()}
    save_file(learned, folder / "expert/model.safetensors", {"format": "pt"})
    save_extended_tokenizer(folder / "hf", folder / "extended", [("q", "q"), ("qq", "q")])
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "project.yaml").write_text(PROJECT)


def write_text(folder: Path) -> None:
    """JSON lines in two languages, the same in all archives, and one file per language."""
    from pyarrow import Table, compress, parquet

    rng = random.Random(0)
    rows = [{"text": sentence(rng, language), "lang": language} for _ in range(20) for language in WORDS]
    text = folder / "text"
    text.mkdir(parents=True)
    lines = as_lines(rows)
    (text / "text.jsonl").write_bytes(lines)
    (text / "text.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (text / "text.jsonl.bz2").write_bytes(bz2.compress(lines))
    (text / "text.jsonl.zst").write_bytes(compress(lines, "zstd", asbytes=True))
    parquet.write_table(Table.from_pylist(rows), text / "text.parquet", row_group_size=9, write_page_checksum=True)
    for language in WORDS:
        for name, some in ((language, rows[:16]), (f"held-out.{language}", rows[16:])):
            (text / f"{name}.jsonl").write_bytes(as_lines(row for row in some if row["lang"] == language))
    large = [{"text": sentence(rng, language), "lang": language} for _ in range(6000) for language in WORDS]
    (folder / "large.jsonl").write_bytes(as_lines(large))
    turns = [{"role": role, "content": row["text"]} for row in large[:4000] for role in ("user", "assistant")]
    chats = ({"messages": turns[i : i + 2], "lang": large[i // 2]["lang"]} for i in range(0, len(turns), 2))
    (folder / "chat.jsonl").write_bytes(as_lines(chats))
    (folder / "chat.jinja").write_text(TEMPLATE)


def as_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def sentence(rng: random.Random, language: str) -> str:
    return " ".join(rng.choices(WORDS[language], k=rng.randint(3, 20)))


def byte_level_tokenizer(folder: Path):  # noqa: ANN201 — transformers' class
    """A tokenizer of any text; and words.model, SentencePiece's."""
    from transformers import PreTrainedTokenizerFast

    from tests.support.small_tokenizers import byte_level_bpe, train_sentencepiece

    texts = [" ".join(words) for words in WORDS.values()]
    train_sentencepiece(folder / "words", texts * 5, 60)
    bpe = byte_level_bpe(texts, 320, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def finish_project(folder: Path) -> None:
    """A project's results and marks, as after its last step."""
    from moelpr.project.reading import read_project
    from moelpr.project.resolved import ResolvedProject
    from moelpr.project.steps.steps import workflow_of

    os.chdir(folder)
    Path("finished.yaml").write_text(FINISHED)
    shutil.copytree("export", "project/hf")
    shutil.copytree("corpus", "project/data")
    card = Path("project/hf/README.md")
    card.write_text(card.read_text().replace("---\n", "---\nmodel-index: []\n", 1))
    for name in ("evaluation/results.json", "evaluation/routing.json", "report.html"):
        (Path("project") / name).parent.mkdir(exist_ok=True)
        (Path("project") / name).write_text("{}")
    workflow = workflow_of(ResolvedProject(read_project(Path("finished.yaml"))))
    for task in workflow.tasks.values():
        workflow.finish(task, workflow._change(task, task.words())[0], 0.0)
    Path("project").rename("finished")


def half_a_run(run_folder: Path, target: Path) -> None:
    """A run of two steps as it was after the first."""
    shutil.copytree(run_folder, target, symlinks=True)
    shutil.rmtree(target / "iter_0000002")
    (target / "latest_checkpointed_iteration.txt").write_text("1")
    (target / "FINISHED").unlink()
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["iteration"] < 2))
