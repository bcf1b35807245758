"""What a reviewer would try instead, and what might be better: the tasks of the settings of `settings.RIVALS`."""

from typing import Any

from examples import tasks
from examples.languages import EXPANDED, LANGUAGES
from examples.other_text import SOURCES as OTHER_SOURCES
from examples.real_model import settings, unseen
from examples.real_model.task_maker import TaskMaker, minutes_of, moe_options, tagged
from examples.tasks import Words
from moelpr.project.workflow.task import Task


def rivals(maker: TaskMaker) -> list[Task]:
    """The settings of the table, and the kept text that some of them have in review."""
    users = {setting.name for setting in settings.RIVALS if setting.training and "kept" in setting.training.blend}
    other = _pack(maker, settings.OTHER, "--without", ",".join(unseen.LANGUAGES))
    options = ("--expanded-languages", ",".join(EXPANDED))
    kept = tasks.preprocess(
        maker.data / "kept", [maker.other / "*.jsonl"], maker.base, "kept", *options, made_from=("other", "base")
    )
    users_of_pack = {
        pack: {name for name, calibrated in settings.CALIBRATED.items() if calibrated.pack == pack}
        for pack in (settings.OTHER, settings.OTHER_KNOWN)
    }
    found = [tagged(users | users_of_pack[settings.OTHER], other), tagged(users, kept)]
    known = _pack(maker, settings.OTHER_KNOWN)
    found.append(tagged(users_of_pack[settings.OTHER_KNOWN], known))
    top3 = maker.run / "upcycled-top-3"
    found += [maker.convert(top3, settings.users_of(top3.name), *moe_options("copies", topk=3))]
    for setting in settings.RIVALS:
        users = settings.users_of(setting.name)
        if (row := setting.training) and row.stage in ("lora", "ffn"):
            found += [_adapted(maker, setting.name, row), maker.evaluate(setting.name)]
        elif row:
            start, options = maker.run / row.start, row.options
            text: dict[str, Any] = {"share": row.share, "blend": row.blend, "highest": row.rate, "seed": row.seed}
            train = maker.train(setting.name, row.stage, start, users, options=options, **text)
            found += [train, maker.evaluate(setting.name)]
    return [*found, *_means(maker)]


def _pack(maker: TaskMaker, name: str, *options: str) -> Task:
    """Text in other languages, code and dialogues."""
    folder = maker.run / name
    words: Words = ["-m", "examples.other_text", "--output", folder, "--cache", maker.run / "downloads"]
    words += [*options, "--overwrite"]
    is_complete = (folder / "pack.manifest.json").is_file
    return Task(name=name, command=words, files=(OTHER_SOURCES,), is_complete=is_complete)


def _adapted(maker: TaskMaker, name: str, row: settings.Training) -> Task:
    """Training by peft or of the FFNs, as the table says."""
    assert row.rate is not None
    number, hf = maker.number_of_steps(row.share), maker.run / f"{name}-hf"
    words: Words = ["-m", "examples.real_model.lora", "--base", maker.base, "--run", maker.run / name]
    words += ["--data-path", *maker.blended(row.blend), "--save", hf, "--train-iters", str(number)]
    words += ["--seed", str(row.seed), *(["--only-ffn"] if row.stage == "ffn" else ["--rank", "16"])]
    words += ["--lr", f"{row.rate:g}"]
    task = Task(
        name=name,
        command=words,
        made_from=("base", *(f"preprocess-{group}" for group in row.blend)),
        is_complete=(hf / "config.json").is_file,
        continues=maker.run / name,
    )
    return tagged(settings.users_of(name), task, minutes=1 + minutes_of("lora", number), memory_gib=8, disk_gib=1.5)


def _means(maker: TaskMaker) -> list[Task]:
    """Means of the base's weights and those of a fine-tuned model."""
    of = settings.HALFWAY_OF
    found = [tagged({*settings.MEANS, of}, tasks.export(maker.run / of), disk_gib=0.6)]
    for name, share in settings.MEANS.items():
        save = maker.run / f"{name}-hf"
        words: Words = ["-m", "examples.real_model.halfway", maker.base, maker.run / f"{of}-hf", "--save", save]
        made_from, is_complete = ("base", f"export-{of}"), (save / "config.json").is_file
        words += ["--share", f"{share:g}"]
        task = Task(name=name, command=words, made_from=made_from, is_complete=is_complete)
        found += [tagged({name}, task, disk_gib=0.6), maker.evaluate(name)]
    return [*found, *(task for name, its in settings.CALIBRATED.items() for task in _calibrated(maker, name, its))]


def _calibrated(maker: TaskMaker, name: str, calibrated: settings.Calibrated) -> list[Task]:
    """An export with calibrated routers; kept text is that of the training, and in other languages."""
    run, pack, save = calibrated.run, calibrated.pack, maker.run / f"{name}-hf"
    export = tasks.export(maker.run / run)
    words: Words = ["-m", "moelpr", "model", "calibrate", "--model", maker.run / f"{run}-hf", "--base", maker.base]
    words += ["--expanded-languages", ",".join(EXPANDED), "--dtype", "bfloat16", "--save", save, "--overwrite"]
    words += calibrated.options
    files = maker.train_files(LANGUAGES)

    def command() -> Words:
        kept = {path.stem: path for path in sorted((maker.run / pack).glob("*.jsonl"))} if pack else {}
        return [*words, *(word for text, path in (files | kept).items() for word in ("--data", f"{text}={path}"))]

    made_from, is_complete = ("base", export.name, "split", *([pack] if pack else [])), (save / "config.json").is_file
    task = Task(name=name, command=command, made_from=made_from, is_complete=is_complete, minutes=2)
    is_made = export.name in settings.CONTINUED.values() and not maker.is_short  # for its continuations
    is_made |= name != next(other for other, its in settings.CALIBRATED.items() if its.run == run)
    found = [] if is_made else [tagged(settings.calibrated_of(run), export, disk_gib=1.2)]
    return [*found, tagged({name}, task, disk_gib=1.2), maker.evaluate(name)]
