"""Read languages.yaml, and check what is known before anything runs: models, text, and whether keys have an effect."""

from collections.abc import Mapping
from pathlib import Path

from moelpr.base.errors import MachineError, UserError, did_you_mean
from moelpr.base.languages import canonical, check_name
from moelpr.data.manifest import Manifest
from moelpr.data.text import remote
from moelpr.data.text.filters import Filter
from moelpr.data.text.reading import check_form
from moelpr.model.families.hf_config import CONFIG_FILE
from moelpr.model.families.hub import is_on_hub
from moelpr.project.file import ProjectFile, Unread, found_text, local_files, parse_project, text_of, versions
from moelpr.project.project import Language
from moelpr.project.resolved import MAIN_STAGE, ResolvedProject
from moelpr.project.steps.steps import STEPS, check_flags

# Keys that other methods than moe-lpr would ignore, and those of them that it ignores too if a token uses one expert.
_FOR_EXPERTS = {"experts", "chat", ("languages", "kept")}
_FOR_STAGES = {"replay", "vocabulary", "chat_template", ("corpora", "stage2"), ("experts", "every_k_layers")}
_FOR_REVIEW = {"replay", ("corpora", "stage2")}  # method: auto has these, too


def read_project(path: Path, assumed: Mapping[str, int] | None = None) -> ProjectFile:
    """Read and check a languages.yaml; paths in it are relative to the current folder.

    Args:
        assumed: Code → bytes of text that is not there yet. Then kept text need not be there either.
    """
    file = parse_project(text_of(path), path)
    languages = dict(file.project.languages)
    for name, size in (assumed or {}).items():
        if (code := canonical(name)) in languages:
            languages[code].text.clear()
        elif code not in file.project.languages.kept:
            raise UserError(f"--assume {name}: {path} has no such language; {did_you_mean(code, languages, 'add it')}")
        file.assumed[code] = size
    _check(file)
    return file


def _check(file: ProjectFile) -> None:
    """Check what is known before anything runs: models, text and steps.

    Raises:
        UserError: Something is missing or unknown.
    """
    project = file.project
    for key in ("model", "chat"):
        if (name := getattr(project, key)) is not None:
            check_name_of_model(name, f"{file.at(key)}{key}")
    if project.chat == project.model:
        raise UserError(f"{file.at('chat')}chat: {project.chat} is the base itself; name its chat model, or remove it")
    for key in ("output", "text_output"):
        if remote.is_remote(getattr(project, key) or ""):
            raise UserError(
                f"{file.at(key)}{key}: {getattr(project, key)} is a URI; name a folder, and copy what it gets "
                "from there"
            )
    if Path(project.output).is_file() or Path(project.output).resolve() == Path("/"):
        what = "the root of all folders" if Path(project.output).is_dir() else "a file"
        raise UserError(f"{file.at('output')}output: {project.output} is {what}; name a folder")
    if Path(project.model).resolve() in (output := Path(project.output).resolve(), *output.parents):
        raise UserError(f"{file.at('output')}output: {project.output} is in the model's folder; name one outside")
    if project.benchmarks and (tasks := project.benchmarks.tasks) and not Path(tasks).is_file():
        raise UserError(f"{file.at('benchmarks', 'tasks')}benchmarks.tasks: there is no file {tasks}; correct the path")
    kept = {name: Language([text]) for name, text in project.languages.kept.items() if text}
    has_corpora, is_strict = project.corpora is not None, "on-error" not in project.steps.get("preprocess", {})
    problems = []
    for group, texts in (
        ("expanded", project.languages.expanded),
        ("original", project.languages.original),
        ("kept", kept),
    ):
        for name, language in texts.items():
            try:
                if group != "kept":
                    check_name(name)
                if language.filter:
                    Filter(language.filter)
                if canonical(name) in file.assumed or (group == "kept" and file.assumed):
                    continue
                if unread := _unread(file, group, name, language):
                    file.unread[canonical(name)] = unread
                    continue
                _check_text(language, has_corpora=has_corpora and group != "kept", is_strict=is_strict)
            except UserError as error:
                place = "languages", group, name
                problems.append(f"{file.at(*place)}{'.'.join(place)}: {error}")
                if "credentials" in str(error) or "not installed" in str(error):  # Other texts need them, too.
                    raise UserError(problems[-1]) from None
    if problems:
        several = [f"{len(problems)} texts are wrong:"] if len(problems) > 1 else []
        raise UserError("\n- ".join([*several, *problems]))
    _check_conversations(file)
    _check_method(file)
    names = [name for name, step in STEPS.items() if step.tool]
    for name, flags in project.steps.items():
        if name not in names:
            hint = did_you_mean(name, names, f"the steps are {', '.join(names)}")
            raise UserError(f"{file.at('steps', name)}steps.{name} is unknown; {hint}")
        if flags:
            check_flags(file, name)


def check_name_of_model(name: str, place: str) -> None:
    """Raise a `UserError`, which starts with `place`, unless this is the folder of a model, or a name on the Hub."""
    if not Path(name).exists() and not is_on_hub(name):
        raise UserError(
            f"{place}: there is no folder {name}, and it is no name on the Hub (OWNER/NAME or OWNER/NAME@REVISION); "
            "correct it"
        )
    if Path(name).exists() and not Path(name, CONFIG_FILE).is_file():
        raise UserError(f"{place}: there is no {CONFIG_FILE} in {name}; name the folder of a model")


def _check_method(file: ProjectFile) -> None:
    """Check that nothing is given that the method would ignore."""
    project = file.project
    has_stages, way = project.way == "moe-lpr", f"method: {project.method}"
    has_review = has_stages or project.way == "auto"
    ignored = set() if has_stages else _FOR_STAGES - (_FOR_REVIEW if has_review else set())
    if not project.has_experts:
        ignored |= _FOR_EXPERTS
    elif not has_stages and project.method == "moe-lpr":
        way = "experts.topk: 1, whose routers moelpr model combine finds without training"
    others = [name for name, step in STEPS.items() if project.way not in step.methods]
    for key in file.lines:
        is_ignored = key[0] == "lora" and project.method != "lora"
        is_ignored |= key[0] == "steps" and len(key) > 1 and key[1] in others
        is_ignored |= key[:3] == ("steps", "export", "as") and not has_stages and project.has_experts
        is_ignored |= key[0] in ignored or key[:2] in ignored or (not has_stages and key[-1] == "conversations")
        if is_ignored:
            name = ".".join(map(str, key))
            other = ", or set method: review" if project.has_experts and not has_stages else ""
            other = "; the step that writes the model is combine" if key[-1] == "as" else other
            if key[0] == "steps" and key[1] in MAIN_STAGE.values():
                way += ", experts.rank" if project.way == "low-rank-ffn" else ""
                other = f"; the step that trains is {MAIN_STAGE[project.way]}"
            raise UserError(f"{file.at(*map(str, key))}{name} does not apply to {way}; remove it{other}")
        if project.experts.per_language and (key[0] == "corpora" or key[-1] in ("weight", "temperature")):
            raise UserError(f"{file.at(*map(str, key))}{key[-1]} does not apply to experts: per-language; remove it")
    if project.corpora and project.mix.replay:
        raise UserError(f"{file.at('mix', 'replay')}mix.replay has no effect with corpora; give them weights instead")
    if project.corpora and has_review and project.replay and not project.corpora.stage2:
        raise UserError(f"{file.at('corpora')}corpora.stage2 is missing; add the corpora of stage 2")


def _check_conversations(file: ProjectFile) -> None:
    languages, template = file.project.languages, file.project.chat_template
    in_expanded, in_original = (
        any(one.conversations for one in group.values()) for group in (languages.expanded, languages.original)
    )
    if template and not (in_expanded or in_original):
        raise UserError(f"{file.at('chat_template')}chat_template requires conversations in a language; add them")
    if template and not Path(template).is_dir():
        raise UserError(
            f"{file.at('chat_template')}chat_template: there is no folder {template}; download the chat model"
        )
    is_kept = "lpr-loss-coeff" in file.project.steps.get("sft", {})
    if in_expanded and not in_original and not is_kept:
        raise UserError(
            f"{file.at('languages', 'original')}no original language has conversations, which keep what the model "
            "answers in it; add some, or set steps.sft.lpr-loss-coeff to 0"
        )


def _unread(file: ProjectFile, group: str, name: str, language: Language) -> Unread | None:
    """Why text cannot be read, if tasks have read it, which are not done again for that."""
    project, code = ResolvedProject(file, is_judged=False), canonical(name)
    manifest = project.manifest(code)
    routers = (project.folder / "logs" / f"{task}.json" for task in ("combine", "calibrate"))
    if not (any(path.is_file() for path in routers) if group == "kept" else manifest.is_file()):
        return None
    try:
        names = [*language.text, *([language.held_out] if language.held_out else [])]
        if gone := [path for path in local_files(names) if not path.exists()]:
            raise UserError(f"there is no file {gone[0]}; correct the path")
        versions(*names)
        return None
    except (UserError, MachineError) as error:
        size = 0 if group == "kept" else sum(one.bytes or 0 for one in Manifest.read_file(manifest).sources)
        return Unread(size, type(error)(f"{file.at('languages', group, name)}languages.{group}.{name}: {error}"))


def _check_text(language: Language, has_corpora: bool, is_strict: bool) -> None:
    if not language.text and not has_corpora:
        raise UserError("it has no text; add text: FILE")
    if has_corpora and not language.held_out:
        raise UserError("it requires held_out: FILE, because corpora are given")
    for uri in filter(remote.is_remote, [*language.text, *language.conversations, language.held_out or ""]):
        if remote.shown(uri) != uri:
            raise UserError(
                f"{remote.shown(uri)} has a query, which logs would show; download it, or pass its s3:// URI"
            )
    held_out = [Path(language.held_out)] if language.held_out and not remote.is_remote(language.held_out) else []
    for path in [*local_files(language.text), *held_out, *local_files(language.conversations)]:
        if not path.exists():
            raise UserError(f"there is no file {path}; correct the path, or plan with --assume LANG=SIZE")
        if not path.stat().st_size and len(found_text(*language.text)) < 2:
            raise UserError(f"{path} is empty; add text, or remove the language")
    for path in [*held_out, *local_files(language.text)[:1]] if is_strict else []:
        check_form(path, language.json_key)
