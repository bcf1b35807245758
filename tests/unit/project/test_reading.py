"""A wrong languages.yaml is one sentence with the file, the line, the key, and what would work."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from moelpr.base.quantities import parse_bytes
from moelpr.project import commands
from moelpr.project.budget import tokens_or_estimates
from moelpr.project.file import parse_project
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.steps import tasks_of
from moelpr.project.template import template
from tests.support.mutations import mutated
from tests.unit.project.conftest import Write

ORIGINAL = {"en": "en.jsonl"}


def test_a_file_with_the_fewest_keys_has_defaults(write: Write) -> None:
    project = read_project(write()).project
    assert (project.mix.temperature, project.experts.topk, project.replay.original_documents) == (0.3, 2, 50_000)
    assert project.languages.expanded["el"].text == ["el.jsonl"] and project.languages.expanded["el"].max_epochs == 4
    for budget in ({"tokens": "24B"}, "24B", 24_000_000_000):
        assert read_project(write(budget=budget)).project.budget.tokens == 24_000_000_000
    assert read_project(write(hardware="h100-80")).project.hardware.gpu == "h100-80"
    auto = read_project(write(experts="auto", hardware="auto")).project
    assert (auto.experts.new, auto.hardware.gpu) == (None, "auto")
    assert read_project(write(experts={"new": "auto"})).project.experts.new is None


@pytest.mark.parametrize(
    ("method", "experts", "expected"),
    [
        ("auto", "auto", (1, None, None)),
        ("second-ffn", None, (1, None, None)),
        ("paper", None, (2, 5, 1)),
        ("paper", {"new": 3}, (2, 3, 1)),
        ("review", {"copies": 1}, (2, None, 1)),
    ],
)
def test_a_method_sets_experts_unless_the_file_does(write: Write, method, experts, expected) -> None:
    chosen = read_project(write(method=method, experts=experts)).project.experts
    assert (chosen.topk, chosen.new, chosen.copies) == expected


def test_a_path_may_start_with_the_home_folder_and_experts_be_their_number(write: Write, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    path = write(output="~/run", experts=3, slurm={"apptainer": "~/image.sif"})
    path.write_text(path.read_text().replace("el.jsonl", "~/el.jsonl"))
    project = read_project(path).project
    assert project.output == f"{Path.cwd()}/run" and project.languages.expanded["el"].text == [f"{Path.cwd()}/el.jsonl"]
    assert project.experts.new == 3 and project.slurm.apptainer == "~/image.sif"


def test_kept_text_can_be_assumed_like_that_of_a_language(write: Write) -> None:
    path = write(**languages(kept={"fi": "no.jsonl"}))
    assert read_project(path, {"fi": 1000}).assumed == {"fi": 1000}
    with pytest.raises(UserError, match="--assume pl: .* has no such language"):
        read_project(path, {"pl": 1000})


def test_each_file_of_kept_text_without_names_is_a_text(write: Write) -> None:
    Path("other").mkdir()
    for name in ("code.jsonl", "pl.jsonl.gz"):
        (Path("other") / name).write_text('{"text": "x"}')
    expected = {"code": "other/code.jsonl", "pl": "other/pl.jsonl.gz"}
    more = ["other/*.jsonl*", "es.jsonl"]
    assert read_project(write(**languages(kept="other"))).project.languages.kept == expected
    assert read_project(write(**languages(kept=more))).project.languages.kept == expected | {"es": "es.jsonl"}
    kept = read_project(write(**languages(kept=["auto", "other/pl.jsonl.gz"]))).project.languages.kept
    assert kept["pl"] == "other/pl.jsonl.gz" and kept["fi"] == kept["code"] == ""


KEPT = {"expanded": {"el": "el.jsonl"}, "original": {"en": "en.jsonl"}, "kept": {"code": "es.jsonl"}}
CORPORA = {"corpora": {"stage1": "a", "stage2": "b"}} | {
    "languages": {"expanded": {"el": {"held_out": "el.jsonl"}}, "original": {"en": {"held_out": "en.jsonl"}}}
}
CHAT = {"text": "el.jsonl", "conversations": "el.jsonl"}
DENSE = {"method": "full", "experts": None}
ONE_CHOICE = {"experts": {"topk": 1}}
APART = {"experts": {"topk": 1, "per_language": True}}


def languages(**groups: Any) -> dict[str, Any]:
    return {"languages": {"expanded": {"el": "el.jsonl"}, "original": ORIGINAL} | groups}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgte": {"tokens": 1}}, r"languages.yaml, line \d+: budgte is unknown; did you mean budget\?"),
        ({"bugdet": {"tokens": 1}, "budget": None}, r"bugdet is unknown \(the first of 2 errors\); did you mean"),
        ({"chat": "base"}, r"line \d+: chat: base is the base itself; name its chat model"),
        ({"output": "el.jsonl"}, r"line \d+: output: el.jsonl is a file"),
        ({"output": "s3://bucket/run"}, r"line \d+: output: s3://bucket/run is a URI; name a folder"),
        (
            {"mix": {"max_epochs": 9}},
            r"line \d+: mix.max_epochs is unknown; its place has the keys temperature, replay",
        ),
        ({"budget": {"days": 1}}, r"line \d+: budget.days is unknown; its place has the keys tokens, hours, epochs"),
        ({"steps": {"ffn": {"lr": {0: 1}}}}, "a key is read as 0; put it in quotes; decimals have a point"),
        ({"experts": {"news": 1}}, r"line \d+: experts.news is unknown; did you mean new\?"),
        (languages(expanded={"Greek": "el.jsonl"}), r"line 5: .* Greek is not the code .*did you mean el\?"),
        (languages(original={"jp": "en.jsonl"}), r"line 7: .* jp is not the code .*did you mean ja\?"),
        (languages(original={"yq": "en.jsonl"}), r"line 7: .* yq is not the code .*such as el"),
        ({"hardware": {"gpu": "none", "gpus": 8}}, r"line \d+: hardware.gpus must be left out .*, got 8; remove it"),
        ({"experts": {"new": "four"}}, r"line \d+: .*expected a whole number such as 24B"),
        (
            {"budget": {"tokens": "24B", "patience": "1B"}, "corpora": {"stage1": ["a"], "stage2": ["b"]}},
            "budget.patience needs a stage on Megatron",
        ),
        ({"budget": {"tokens": "24B", "hours": 1}}, r"line \d+: budget needs exactly one of tokens, hours and epochs"),
        ({"budget": {"tokens": "24B", "patience": "24B"}}, "patience must be less than budget.tokens"),
        (languages(expanded={"el": {"file": "a"}}), r"file is unknown; did you mean text\?"),
        ({"budget": None}, "languages.yaml: budget is missing"),
        ({"kubernetes": {"tolerations": []}}, r"line \d+: kubernetes.tolerations .*; write it under kubernetes.pod"),
        ({"kept": "auto"}, r"line \d+: kept is unknown; write it under languages$"),
        # As a missing login, which is said once.
        (languages(expanded={"el": "credentials"}, original={"en": "no"}), r"\A.* no file credentials.*\Z"),
        (languages(expanded={"el": "s3a://b/el"}), "there is no file s3a://b/el; URIs begin with hf://, s3://"),
        (languages(expanded={"el": "no.jsonl"}), "languages.expanded.el: there is no file no.jsonl"),
        (languages(expanded={"el": {}}), "languages.expanded.el: it has no text; add text: FILE"),
        (languages(expanded={"en": "el.jsonl"}), "language en is given twice"),
        (languages(original={}), "languages.original"),
        (languages(expanded={False: "el.jsonl"}), "a key is read as False; put it in quotes"),
        (languages(kept={"code": "no.jsonl"}), "languages.kept.code: there is no file no.jsonl"),
        (languages(kept={"ell": "en.jsonl"}), r"el is given twice \(expanded.el and kept.ell\)"),
        (languages(original={"en": "el.jsonl"}), "el.jsonl is the text of expanded.el and of original.en; correct one"),
        (
            languages(expanded={"el": "el.jsonl", "hu": "el.jsonl"}),
            "el.jsonl is the text of expanded.el and of expanded.hu",
        ),
        (languages(expanded={"el": {"text": "el.jsonl", "held_out": "el.jsonl"}}), "el.jsonl is text and held_out of"),
        (languages(kept={"fi": "el.jsonl"}), "el.jsonl is the text of expanded.el and of kept.fi; correct one"),
        *(
            (languages(original={name: "en.jsonl"}), "original has ")
            for name in ("a/b", "a,b", "a=b", "-x", "", ".", "..", "../../evil", "a*", "replay", "kept")
        ),
        (languages(original={"a\nb": "en.jsonl"}), "control character"),
        ({"output": "out\0"}, "control character"),
        ({"output": "out\ntouch X #"}, "control character"),
        ({"slurm": {"options": {"a\nb": 1}}}, "control character"),
        (languages(kept="no/*.jsonl"), r"line \d+: .* no/\*.jsonl"),
        (
            languages(kept="none"),
            r"line \d+: languages.kept must be files or auto, got none; to add no text, remove the key",
        ),
        (languages(kept=["es.jsonl", "./es.jsonl"]), r"kept has two files named es "),
        ({"languages": KEPT, "experts": {"copies": 1}}, "remove languages.kept, or set experts.copies: 2"),
        ({"languages": KEPT | {"original": {"en": {"text": "en.jsonl", "json_key": "b"}}}}, "json_key .* b and text"),
        ({"replay": "none"}, "replay: none .* languages.kept"),
        ({"languages": KEPT | {"expanded": {"el": CHAT}}, "replay": "none"}, "conversations .* replay: none"),
        ({"steps": {"stag1": {"lr": 1}}}, r"line \d+: steps.stag1 is unknown; did you mean stage1\?"),
        ({"steps": {"stage1": {"save": "x"}}}, r"line \d+: steps.stage1.save is set by moelpr run; remove it"),
        ({"steps": {"dense": {"lr": 1}}}, r"steps.dense does not apply to method: moe-lpr; .* trains is stage1"),
        ({"corpora": {"stage1": "a", "stage2": "b"}}, "languages.expanded.el: .* held_out: FILE"),
        ({"output": "base/out"}, r"line 2: output: base/out is in the model's folder; name one outside"),
        ({"model": "no/such/folder"}, r"line 1: model: .* no/such/folder"),
        ({"chat_template": "base"}, r"line \d+: chat_template requires conversations"),
        (CORPORA | {"mix": {"replay": 0.1}}, r"line \d+: mix.replay has no effect with corpora"),
        (CORPORA | {"corpora": {"stage1": "a"}}, r"line \d+: corpora.stage2 is missing"),
        ({"method": "full"}, r"line \d+: experts does not apply to method: full; remove it"),
        (
            {"method": "auto", "experts": None} | {"steps": {"export": {"as": "granitemoe"}}},
            r"line \d+: steps.export.as does not apply to method: auto; .* is combine",
        ),
        ({"lora": {"rank": 4}}, r"line \d+: lora does not apply to method: moe-lpr"),
        (DENSE | {"replay": {"epochs": 2}}, r"line \d+: replay does not apply to method: full"),
        (DENSE | {"languages": KEPT}, r"line \d+: languages.kept does not apply to method: full"),
        ({"experts": {"topk": 1, "new": 3}}, r"line \d+: experts.new must be 1 with topk: 1, got 3"),
        ({"experts": {"rank": 8}}, r"line \d+: experts.rank requires topk: 1, got 2"),
        (ONE_CHOICE | {"replay": {"epochs": 2}}, r"line \d+: replay does not apply to experts.topk: 1, .*combine"),
        (ONE_CHOICE | {"vocabulary": {"new_tokens": 9}}, r"line \d+: vocabulary does not apply to experts.topk: 1"),
        (ONE_CHOICE | {"steps": {"stage2": {"lr": 1}}}, r"line \d+: steps.stage2 does not apply to experts.topk: 1"),
        ({"experts": {"topk": 1, "every_k_layers": 2}}, r"line \d+: experts.every_k_layers does not apply"),
        ({"method": "auto", "experts": {"topk": 2}}, "method: auto has experts.topk: 1, got 2; .* method: review"),
        ({"method": "auto", "experts": None, "replay": "none", "languages": KEPT}, "leaves out the review of .* auto"),
        ({"method": "second-ffn", "experts": {"rank": 8}, "steps": {"ffn": {"lr": 1}}}, ", experts.rank; .*s is lora"),
        ({"method": "low-rank-ffn"}, r"method: second-ffn with experts: \{rank: 16\}"),
        ({"method": "auto", "experts": {"rank": 8}}, "experts.rank requires method: second-ffn"),
        ({"method": "auto", "experts": "per-language"}, "experts.per_language requires method: second-ffn"),
        ({"experts": "per-language"}, r"line \d+: experts.per_language requires topk: 1, got 2"),
        ({"method": "full", "experts": "per-language"}, r"line \d+: experts.per_language requires topk: 1"),
        ({"experts": APART["experts"] | {"new": 1}}, r"line \d+: experts.new is a number for all languages, got 1"),
        (APART | {"mix": {"temperature": 1}}, r"line \d+: temperature does not apply to experts: per-language"),
        (APART | CORPORA, r"line \d+: corpora does not apply to experts: per-language"),
        ({"method": "auto", "experts": "auto", "vocabulary": {"new_tokens": 9}}, "vocabulary .* set method: review"),
        ({"method": "second-ffn", "experts": None, "replay": {"epochs": 2}}, "replay .* method: second-ffn"),
        ({"method": "review", "experts": {"topk": 1}}, "method: review has no experts.topk: 1"),
        (CORPORA | {"method": "auto", "experts": None, "corpora": {"stage1": "a"}}, "corpora.stage2 is missing"),
        (DENSE | {"method": "lora", "steps": {"export": {"iteration": 1}}}, r"line \d+: steps.export .* method: lora"),
    ],
)
def test_wrong_content_is_named_with_its_line(write: Write, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_project(write(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "el.jsonl"}, r"line \d+: model: there is no config.json in el.jsonl; name the folder of a model"),
        ({"chat": "empty"}, r"line \d+: chat: there is no config.json in empty"),
        ({"benchmarks": {"tasks": "t.yaml"}}, r"line \d+: benchmarks.tasks: there is no file t.yaml; correct"),
        (languages(expanded={"el": {"text": "no.jsonl", "filter": "score >"}}), r"line \d+: .*expanded.el: .*filter"),
        ({"steps": "fast"}, r"line \d+: steps should be keys with values \({KEY: VALUE}\), got 'fast'"),
    ],
)
def test_what_no_plan_needs_yet_is_checked_by_it(write: Write, changes: dict, message: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=rf"languages.yaml, {message}"):
        read_project(write(**changes), {"el": 10**9})


def test_flags_of_a_recipe_are_checked_unless_the_file_replaces_them(write: Write) -> None:
    steps: dict[str, Any] = {"stage1": {"recipe": "mine.yaml"}}
    Path("mine.yaml").write_text("lr: high\nseq-length: 64\n")
    with pytest.raises(UserError, match=r"line \d+: steps.stage1.recipe: lr: .*high"):
        read_project(write(steps=steps))
    steps["stage1"]["lr"] = 1e-4
    assert read_project(write(steps=steps)).project.steps == steps
    Path("mine.yaml").write_text("seq-lenght: 64\n")
    with pytest.raises(UserError, match=r"recipe: seq-lenght is no flag of this step; did you mean seq-length\?"):
        read_project(write(steps=steps))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"expanded": [("el", "a")], "original": [("ell_Grek", "b")]}, "the language el is given twice; pass it once"),
        ({"expanded": [("greek", "a")]}, r"greek is not the code of a language; did you mean el\?"),
        ({"expanded": [("mathematics", "a")]}, "a language is a code such as el or ell_Grek; correct mathematics"),
        ({"model": "/none"}, "--model: there is no folder /none, and .*; correct it"),
    ],
)
def test_init_writes_no_file_that_cannot_work(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        commands.init(commands.Init(**flags))


def test_text_for_other_programs_may_have_several_lines(write: Write) -> None:
    names = {"code": "en.jsonl", "c++ 2.0": "es.jsonl", "μαθ": "es.jsonl"}
    setup = "pip install\npip list"
    project = read_project(write(**languages(original=names), skypilot={"setup": setup})).project
    assert project.languages.codes("original") == [*names] and project.skypilot.setup == setup


def test_all_texts_that_are_missing_are_named_at_once_a_line_each(write: Write, capsys) -> None:
    path = write(languages={"expanded": {"el": "no.jsonl"}, "original": {"en": "nor.jsonl"}})
    with pytest.raises(SystemExit):
        run_command(lambda: read_project(path))
    assert re.search(r"line 5: .*\.el: .*no\.jsonl.*\n- .*line 7: .*\.en: .*nor\.jsonl", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("line", "message"),
    [("id,text", "not JSON"), ('{"text": "a', "not JSON"), ('{"content": "a"}', r"keys: content\).* json_key")],
)
def test_text_of_another_form_is_an_error_before_anything_runs(write: Write, line: str, message: str) -> None:
    Path("hu.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=rf"line 6: languages.expanded.hu: hu.jsonl, line 2.*{message}"):
        read_project(write())
    read_project(write(steps={"preprocess": {"on-error": "skip"}}))


def test_a_file_that_cannot_be_read_or_is_empty_is_an_error(write: Write, tmp_path) -> None:
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=message):
            read_project(path)
    path = write()
    (tmp_path / "hu.jsonl").write_text("")
    with pytest.raises(UserError, match="languages.yaml, line 6: languages.expanded.hu: hu.jsonl is empty"):
        read_project(path)
    path.write_text(path.read_text() + "model: other\n")
    with pytest.raises(UserError, match="line .*the key model is there twice"):
        read_project(path)


@pytest.mark.parametrize(
    "languages, message",
    [
        (
            "  expanded: {el: el.jsonl}\n  original:\n    en: en.jsonl\n    off: no.jsonl\n",
            "line 6: a key is read as F",
        ),
        (
            '  expanded: {el: el.jsonl}\n  original:\n    en: [a.jsonl,\n      "b\\a"]\n',
            "line 6: 'b.*control character",
        ),
        ("  expanded: {el: &e {text: el.jsonl}, hu: {<<: *e, 1: 2}}\n", "line [0-9]: a key is read as 1"),
    ],
)
def test_a_wrong_key_or_word_has_its_line(write: Write, languages: str, message: str) -> None:
    path = write()
    path.write_text(f"model: base\nlanguages:\n{languages}")
    with pytest.raises(UserError, match=f"languages.yaml, {message}"):
        read_project(path)


def test_a_key_that_is_a_date_is_one_sentence(write: Write) -> None:
    path = write()
    path.write_text(path.read_text() + "2026-01-01: x\n")
    with pytest.raises(UserError, match=r"a key is read as datetime.date\(2026, 1, 1\); put it in quotes, such as"):
        read_project(path)


def test_an_edit_is_noticed(write: Write) -> None:
    file = read_project(write())
    file.check_unchanged()
    file.path.write_text(f"# a comment\n{file.path.read_text()}")
    file.check_unchanged()
    write(held_out=7)
    with pytest.raises(UserError, match="languages.yaml was edited after this run started"):
        file.check_unchanged()


def test_the_template_is_a_file_that_works(write: Write) -> None:
    assert "# chat: Qwen/Qwen3-8B " in template("Qwen/Qwen3-8B-Base")  # as the publisher names it
    path = write()
    expanded = [("el", "el.jsonl"), ("no", "hu.jsonl")]
    path.write_text(template("base", expanded, [("en", "en.jsonl")]))
    languages = read_project(path).project.languages
    assert languages.expanded["el"].text == ["el.jsonl"] and "no" in languages.expanded
    text = path.read_text().replace("base-Instruct", "owner/name")
    path.write_text(
        re.sub(r"^# (?=(chat:|benchmarks|trackers|steps|  preprocess|  ffn))", "", text, flags=re.MULTILINE)
    )
    project = read_project(path).project
    assert project.chat and project.benchmarks and project.trackers.wandb_project
    assert project.steps["ffn"]["save-interval"] == 500
    apart = text.replace("# experts: per-language", "experts: per-language")
    path.write_text(apart.replace("method: auto", "method: second-ffn"))
    assert read_project(path).project.experts.per_language
    text = re.sub("^# (?=(vocabulary|experts: {|mix|replay))", "", text, flags=re.MULTILINE)
    path.write_text(text.replace("method: auto", "method: review"))
    assert read_project(path).project.vocabulary


@settings(deadline=None)  # the first example builds the validator
@given(mutated(template("base", [("el", "el.jsonl")], [("en", "en.jsonl")]).encode()))
def test_a_damaged_file_is_read_or_one_sentence(content: bytes) -> None:
    try:
        parse_project(content.decode(errors="replace"), Path("languages.yaml"))
    except UserError as error:
        assert str(error).count("languages.yaml") >= 1 and "\n" not in str(error)


def test_assumed_text_need_not_be_there_and_decides_the_tokens(write: Write) -> None:
    languages = {"expanded": {"el": "no/el.jsonl", "hu": "hu.jsonl"}, "original": {"en": "no/*.jsonl"}}
    languages["kept"] = {"code": "no/code.jsonl"}
    path = write(languages=languages, budget={"tokens": "8M"})
    with pytest.raises(UserError, match="no/el.jsonl.*--assume"):
        read_project(path)
    project = ResolvedProject(read_project(path, {"ell": 8_000_000, "en": 1_000_000}))
    assert tokens_or_estimates(project, "stage1")[0] == {"el": 2_000_000, "hu": Path("hu.jsonl").stat().st_size // 4}
    (preprocess,) = [task for task in tasks_of(project) if task.name == "preprocess-el"]
    assert preprocess.disk_gib == 2 * 8e6 / 2**30
    with pytest.raises(UserError, match="--assume fi: .* no such language"):
        read_project(path, {"fi": 1})


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8e9), ("8G", 8e9), ("1.5TB", 1.5e12), ("500MB", 5e8), ("3kb", 3e3), ("2T", 2e12), ("500B", 500)],
)
def test_a_size_is_a_number_of_bytes(text: str, size: float) -> None:
    assert parse_bytes(text) == size
