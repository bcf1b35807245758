"""Cases of damaged and hostile files, kills, full disks and faulty networks: how each is made, run and judged.

A case is a kind, a seed and a number, and can be repeated from these three. It ends in the right result, in one
sentence with exit code 1 or 2, or raises `Failure`.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, cached_property
from pathlib import Path
from random import Random

from moelpr.base.command import STOPPED
from tests.faults import hostile
from tests.faults.commands import (
    COMMANDS,
    Command,
    Judge,
    anything,
    digests,
    fill,
    launch,
    run,
    same_corpus,
    same_files,
    same_print,
    same_run,
    same_settings,
    same_tensors,
    start,
)
from tests.faults.damage import change_words, damage
from tests.faults.material import seconds, undisturbed
from tests.faults.oracles import recipe_holds, right_scores, right_text, right_tokens
from tests.faults.processes import Ended, Failure, Running
from tests.support.text_server import text_server


class Outcome(StrEnum):
    RIGHT = "right result"
    CLEAN = "clean end, result not judged"
    REFUSED = "one sentence"
    FAILED = "failed"


@dataclass
class Case:
    """A case, and its folder."""

    kind: str
    seed: int
    number: int
    folder: Path
    material: Path
    notes: list[str] = field(default_factory=list)  # steps done, to be printed if the case fails

    @cached_property
    def random(self) -> Random:
        return Random(f"{self.kind} {self.seed} {self.number}")

    @property
    def box(self) -> Path:
        return self.folder / "box"

    def prepare(self, name: str) -> Path:
        """Fill the box for a command; returns the box of the undisturbed run."""
        self.notes.append(name)
        other = undisturbed(name, self.material)
        fill(self.box, COMMANDS[name], self.material)
        return other

    def judge(self, ended: Ended, is_right: Judge, other: Path) -> Outcome:
        """Raise `Failure` unless the command ended well."""
        ended.require_clean()
        if left := [
            name
            for name in digests(self.box)
            if re.search(r"/\.[^/]*\.(tmp-[0-9a-f-]+\d+(-old)?|partial|unfinished)$", name)
        ]:
            raise Failure(f"left behind: {', '.join(left)}")
        if ended.code:
            return Outcome.REFUSED
        if is_right is anything:
            return Outcome.CLEAN
        require_result(self, is_right, other)
        return Outcome.RIGHT


@dataclass(frozen=True)
class Reading:
    """Files that a command reads, and when its result is right although one of them is damaged."""

    command: str
    files: str  # patterns, relative to the box
    is_right: Judge
    weight: float = 1.0  # how often, compared with other readings: less for commands that take seconds

    def paths(self, box: Path) -> list[Path]:
        paths = sorted({path for pattern in self.files.split() for path in box.glob(pattern) if path.is_file()})
        assert paths, f"{self.files}: no such files"
        return paths


def inside(folder: str, names: str) -> str:
    return " ".join(f"{folder}/{name}" for name in names.split())


CORPUS = inside("corpus", "*.bin *.idx *.lang")
STEP = "*.distcp .metadata metadata.json checksums.json"
START, LAST, HALF = "checkpoint/release", "stage1/iter_0000002", "out/run/iter_0000001"
RUN = inside("stage1", "metrics.jsonl recipe.yaml iter_0000002/recipe.yaml command.json versions.json")

DAMAGED: dict[str, tuple[Reading, ...]] = {
    "corpora": (
        Reading("merge", CORPUS, same_files),
        Reading("merge", "corpus/*.json", same_corpus),
        Reading("sample", CORPUS, same_files),
        Reading("sample", "corpus/*.json", same_corpus),
        Reading("inspect", "corpus/en*.bin corpus/en*.idx corpus/en*.lang", same_print),
        Reading("inspect", "corpus/en*.json", anything),
        Reading("tag", "out/el*.bin out/el*.idx", anything),  # nothing says what they were
        Reading("settings", f"{CORPUS} corpus/*.json", same_settings, 0.3),
        Reading("train", f"{CORPUS} corpus/*.json", same_run, 0.03),
    ),
    "text": (
        Reading("preprocess", "text/text.jsonl", right_text("text/text.jsonl"), 4),
        *(
            Reading(form, f"text/text.{form}", right_text(f"text/text.{form}"))
            for form in ("jsonl.gz", "jsonl.bz2", "jsonl.zst", "parquet")
        ),
        Reading("sentencepiece", "text/text.jsonl", anything),
        Reading("extend", "text/el.jsonl text/en.jsonl", anything),
    ),
    "tokenizers": (
        Reading("preprocess", "hf/tokenizer*.json", right_tokens),
        Reading("sentencepiece", "words.model", anything),
        Reading("extend", "hf/tokenizer*.json", anything),
        Reading("convert", "hf/tokenizer*.json", same_tensors),
        Reading("new tokens", "extended/*.json", anything),  # a damaged ID of an old token may be that of another
        Reading("export", "checkpoint/hf/tokenizer*.json", same_tensors),
        Reading("settings", "checkpoint/hf/tokenizer*.json", same_settings, 0.3),
        Reading("evaluate", "hf/tokenizer*.json", anything, 0.2),
    ),
    "configs": (
        Reading("convert", "hf/config.json hf/generation_config.json", same_tensors),
        Reading("another round", "export/config.json export/generation_config.json", same_tensors),
        Reading("export", "checkpoint/hf/*config.json checkpoint/model_spec.json", same_tensors),
        Reading("combine", "expert/config.json hf/config.json", same_tensors, 0.3),
        Reading("build of packs", "pack/*.json kept/*.json", same_tensors),
        Reading("settings", "checkpoint/hf/config.json checkpoint/model_spec.json", anything, 0.3),
        Reading("plan", "hf/config.json", anything),
        Reading("evaluate", "hf/*config.json", anything, 0.2),
        Reading("evaluate a checkpoint", "stage1/hf/config.json stage1/model_spec.json", anything, 0.1),
        Reading("train", "checkpoint/hf/config.json checkpoint/model_spec.json", anything, 0.03),
    ),
    "weights": (
        Reading("convert", "hf/*.safetensors", anything),  # downloaded, without checksums
        Reading("another round", "export/*.safetensors export/checksums.json", same_files),
        Reading("combine", "expert/*.safetensors", anything, 0.3),  # without checksums
        Reading("build of packs", "pack/*.safetensors pack/checksums.json kept/*.safetensors", same_files),
        Reading("evaluate an export", "export/*.safetensors export/checksums.json", same_print, 0.2),
    ),
    "checkpoints": (
        Reading("export", f"{inside(START, STEP)} checkpoint/*.txt", same_files),
        Reading("export a run", inside(LAST, STEP), same_files),
        Reading("export a run", "stage1/*.txt", same_tensors),
        Reading("evaluate a checkpoint", inside(LAST, STEP), same_print, 0.2),
        Reading("train", f"{inside(START, STEP)} checkpoint/*.txt", same_run, 0.1),
        Reading("resume", f"{inside(HALF, STEP)} out/run/*.txt", same_run, 0.1),
        Reading("resume", "out/run/*.json out/run/*.yaml out/run/iter_*/*.yaml out/run/metrics.jsonl", anything, 0.05),
    ),
    "recipes": (Reading("settings", "recipe.yaml", recipe_holds), Reading("compare", "project.yaml", anything, 0.1)),
    "metrics": (Reading("report", RUN, anything, 0.3), Reading("export a run", RUN, same_tensors, 0.5)),
    "evaluation data": (
        Reading("evaluate", "text/*.jsonl", right_scores),
        Reading("evaluate again", "out/evaluation/parts/*/*.json", same_print, 0.5),
    ),
}


def damaged_input(case: Case) -> Outcome:
    """One file that a command reads is damaged."""
    readings = DAMAGED[case.kind]
    reading = case.random.choices(readings, [reading.weight for reading in readings])[0]
    other = case.prepare(reading.command)
    path = case.random.choice(reading.paths(case.box))
    case.notes.append(f"{path.relative_to(case.box)}: {damage(path, case.random)}")
    # Few as a user starts them, which takes seconds.
    begin = launch if case.random.random() < 0.01 else start
    command = COMMANDS[reading.command]
    return case.judge(begin(command, case.box, command.words).wait(), reading.is_right, other)


def wrong_arguments(case: Case) -> Outcome:
    """A command line with wrong, missing and additional arguments."""
    # Few of those that take seconds.
    names = [name for name in COMMANDS if not COMMANDS[name].script and "large" not in name]
    slow = ("evaluate", "compare", "report", "train", "resume")
    name = case.random.choices(names, [0.1 if candidate.startswith(slow) else 1 for candidate in names])[0]
    case.prepare(name)
    words, how = change_words(COMMANDS[name].words, flags_of(COMMANDS[name].name, case.folder / "help"), case.random)
    case.notes.append(how)
    return case.judge(run(COMMANDS[name], case.box, words), anything, case.box)


@cache
def flags_of(command: str, folder: Path) -> list[str]:
    """All flags that --help names."""
    (folder / "box").mkdir(parents=True)
    printed = Running.forked(command, ["--help"], folder / "box").wait().output
    return sorted({*re.findall(r"(?<![\w-])--[a-z][\w-]+", printed)} - {"--debug"})


def hostile_file(case: Case) -> Outcome:
    """One file that a command reads would run code if it were unpickled, or imported."""
    name, file, payload = hostile.choose(case.seed, case.number, case.material)
    other = case.prepare(name)
    case.notes.append(f"{file}: {payload}")
    ran = case.folder / "ran"
    hostile.place(payload, case.box / file, ran, case.random)
    ended = run(COMMANDS[name], case.box)
    if ran.exists():
        raise Failure(f"code from {file} was run")
    return case.judge(ended, anything, other)


# Commands that are killed, write to a full disk, and run twice at once: the command, options for resuming, the judge.
WRITERS: dict[str, tuple[str, Judge]] = {
    "preprocess a large file": ("--resume", same_files),
    "preprocess conversations": ("--resume", same_files),
    "merge large corpora": ("", same_files),
    "sample a large corpus": ("", same_files),
    "convert": ("", same_files),
    "export": ("", same_files),
    "combine": ("", same_files),
    "build of packs": ("", same_files),
    "train": ("", same_run),
}
STARTED = [name for name in WRITERS if name != "train"]
SIGNALS = [signal.SIGKILL] * 6 + [signal.SIGTERM, signal.SIGINT]


def a_writer(case: Case) -> str:
    return case.random.choices([*WRITERS], [0.2 if name == "train" else 1 for name in WRITERS])[0]


def killed(case: Case, name: str, begin: Callable[[Command, Path, list[str]], Running]) -> Outcome:
    """A signal to a command at any moment of its work, and the same command again."""
    options, is_right = WRITERS.get(name, ("", same_run))
    command, other = COMMANDS[name], case.prepare(name)
    words = [*command.words, *options.split()]
    for _ in range(case.random.choice([1, 1, 2])):
        running = begin(command, case.box, words)
        wait_for_a_moment(case, running, name, is_forked=begin is start)
        number, whom = case.random.choice(SIGNALS), case.random.choice(["group", "launcher", "one"])
        case.notes.append(f"{number.name} to {whom}")
        running.send(number, whom, case.random)
        ended = running.wait()
        if ended.code not in (-number, 128 + number, STOPPED) and not ended.never_started:
            ended.require_clean()
    if options and case.random.random() < 0.5:  # as moelpr run goes on with a project that was copied
        case.notes.append("touched")
        for path in case.box.glob("*.jsonl"):
            path.touch()
        words.append("--overwrite")
    return resumed(case, begin(command, case.box, words).wait(), is_right, other)


def resumed(case: Case, ended: Ended, is_right: Judge, other: Path) -> Outcome:
    """Raise `Failure` unless the command has completed what was interrupted, or found it complete."""
    ended.require_clean()
    if ended.code and "already exists" not in ended.errors:
        raise Failure(f"it does not resume:\n{ended.last_words()}")
    require_result(case, is_right, other)
    return Outcome.RIGHT


def require_result(case: Case, is_right: Judge, other: Path) -> None:
    """Raise `Failure` unless the output is right."""
    if not is_right(case.box, other):
        here, there = digests(case.box / "out"), digests(other / "out")
        names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise Failure(f"a wrong result: {', '.join(names[:5])}")


def wait_for_a_moment(case: Case, running: Running, name: str, is_forked: bool) -> None:
    """Any moment of a command's life; mostly, for a started one, after it has begun to write."""
    seconds_alone = seconds(name, case.material)
    if not is_forked and case.random.random() < 0.75:
        begun = "*/run/iter_*" if case.random.random() < 0.5 else "*/run/metrics.jsonl"
        pattern, seconds_alone = (f"{begun}", 3.0) if COMMANDS[name].script else ("out/*", seconds_alone)
        deadline = time.monotonic() + 100
        while not any(case.box.glob(pattern)) and time.monotonic() < deadline and not running.is_over(0.003):
            pass
    elif not is_forked and not COMMANDS[name].script:
        seconds_alone += 5  # imports
    running.is_over(case.random.uniform(0, seconds_alone * 1.1))


def full_disk(case: Case) -> Outcome:
    """The output is on a disk that fills; with more room, the same command completes it."""
    name = a_writer(case)
    options, is_right = WRITERS[name]
    other = case.prepare(name)
    size = sum(path.stat().st_size for path in (other / "out").rglob("*") if path.is_file())
    room = case.random.randint(1, max(2, size * 5 // 4 // 4096)) * 4096
    case.notes.append(f"{room} bytes for {size}")
    words = [*COMMANDS[name].words, *options.split()]
    with small_disk(case.box / "out", room):
        ended = run(COMMANDS[name], case.box, words)
        ended.require_clean()
        if ended.code:
            subprocess.run(["mount", "-o", "remount,size=256m", case.box / "out"], check=True)
            again = run(COMMANDS[name], case.box, words)
            if again.code:
                raise Failure(f"with enough room, code {again.code}:\n{again.last_words()}")
        require_result(case, is_right, other)
    return Outcome.REFUSED if ended.code else Outcome.RIGHT


@contextmanager
def small_disk(folder: Path, room: int):  # noqa: ANN201 — a context manager
    """Mount a file system in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def why_no_disk(folder: Path) -> str:
    """Why `full_disk` can't be tried on this machine; "" if it can."""
    folder.mkdir()
    try:
        with small_disk(folder, 4096):
            return ""
    except (OSError, subprocess.CalledProcessError):
        return "a tmpfs can't be mounted here (it needs root)"


def two_at_once(case: Case) -> Outcome:
    """Two jobs with one output: one writes it, the other is refused, or the first has finished."""
    name = a_writer(case)
    is_right = WRITERS[name][1]
    other = case.prepare(name)
    first = start(COMMANDS[name], case.box, name="first-")
    first.is_over(case.random.choice([0, case.random.uniform(0, seconds(name, case.material))]))
    second = start(COMMANDS[name], case.box, name="second-")
    ends = [first.wait(), second.wait()]
    for ended in ends:
        ended.require_clean()
    codes = sorted(ended.code for ended in ends)
    is_finished = any("is finished, step" in ended.output for ended in ends)  # training that has nothing left to do
    if codes != [0, 2] and not (codes == [0, 0] and is_finished):
        raise Failure(f"exit codes {codes}:\n{ends[0].last_words()}\n{ends[1].last_words()}")
    require_result(case, is_right, other)
    return Outcome.RIGHT


def disturbed_network(case: Case) -> Outcome:
    """Text on a server that fails for a while, forbids or changes its file, or a kill; then the same command again."""
    name, suffix = case.random.choice([("preprocess", "jsonl"), *((form, form) for form in ("jsonl.gz", "parquet"))])
    other = case.prepare(name)
    with text_server(case.box / "text") as server:
        os.environ |= server.environment | {"HF_HOME": str(case.folder / "cache")}
        uri = server.uri(case.random.choice(["http", "s3"]), f"text.{suffix}")
        words = [uri if word.startswith("text/") else word for word in COMMANDS[name].words] + ["--resume"]
        file = case.box / "text" / f"text.{suffix}"
        kind = case.random.choice(["cut", "500", "503", "403", "changed", "killed"])
        case.notes.append(f"{kind} while {uri} is downloaded")
        if kind == "killed":
            running = start(COMMANDS[name], case.box, words)
            wait_for_a_moment(case, running, name, is_forked=True)
            running.send(number := case.random.choice(SIGNALS), "group", case.random)
            case.notes.append(f"{number.name}")
            running.wait()
            return resumed(case, run(COMMANDS[name], case.box, words), same_corpus, other)
        is_brief = kind not in ("403", "changed")
        server.fail(kind if is_brief else "403", times=2 if is_brief else 1 << 30)
        ended = run(COMMANDS[name], case.box, words)
        ended.require_clean()
        if is_brief or not ended.code:
            return case.judge(ended, same_corpus, other)
        server.fail("", 0)
        if kind == "changed":
            file.write_bytes(file.read_bytes() + b"\n")
        again = run(COMMANDS[name], case.box, words)
        if kind == "changed":  # nothing may have been written before, so that it starts again
            again.require_clean()
            return Outcome.REFUSED if again.code else Outcome.CLEAN
        return case.judge(again, same_corpus, other)
