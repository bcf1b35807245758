"""`moelpr model push` against a server that answers as the Hub does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint_convert.card.upload import Upload, _explained, check_name
from moelpr.base.errors import UserError
from tests.support.local_hub import TOKEN, LocalHub, local_hub

CARD = "---\nlicense: apache-2.0\nbase_model: me/base\nlanguage:\n- el\n---\n\n# A model\n"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with local_hub() as actual:
        yield actual


@pytest.fixture
def export(make_model: Callable[..., Path]) -> Path:
    """A model with a card, and what an export never has."""
    folder = make_model("LlamaForCausalLM", tokenizer=True, save={"max_shard_size": "60KB"})
    (folder / "README.md").write_text(CARD)
    for name in ("packs.json", "calibration.json"):  # needed to add or remove packs
        (folder / name).write_text("{}")
    for name in ("optimizer.pt", "training_args.bin", ".env", "runs/log.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for others")
    return folder


def push(hub: LocalHub, folder: Path, *flags: str, name: str = "me/model", token: str | None = TOKEN):
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    home = str(folder.parent / "hub-home")
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "moelpr", "model", "push", str(folder), name, *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_an_upload_has_exactly_the_models_files_and_resumes(hub: LocalHub, export: Path) -> None:
    own = {path.name for path in export.iterdir() if path.suffix in (".json", ".safetensors", ".md", ".jinja")}
    assert {"README.md", "config.json", "tokenizer.json"} < own
    hub.broken = True
    cut = push(hub, export)
    assert cut.returncode == 1 and "run it again to resume" in cut.stderr and "Traceback" not in cut.stderr
    assert hub.repositories == {"me/model": {}}
    hub.broken = False
    done = push(hub, export)
    assert done.returncode == 0, done.stderr
    assert {*hub.repositories["me/model"]} == own and hub.private == {"me/model"}
    assert all(content == (export / name).read_bytes() for name, content in hub.repositories["me/model"].items())
    assert len(hub.received) == len({*hub.received})  # the second call sent nothing again
    assert ".env" in done.stdout and "model-index" in done.stdout


def test_a_dry_run_asks_nobody(hub: LocalHub, export: Path) -> None:
    done = push(hub, export, "--dry-run", token=None)
    assert done.returncode == 0 and hub.asked == []
    assert "license: apache-2.0" in done.stdout and "model.safetensors.index.json" in done.stdout
    assert "optimizer.pt" not in done.stdout.split("note:")[0]


def test_an_upload_of_another_shape_is_refused_or_replaces_all_weights(hub: LocalHub, export: Path) -> None:
    other = json.dumps({"architectures": ["Qwen3ForCausalLM"]}).encode()
    stale = {"model-00009-of-00009.safetensors": b"old", "notes.md": b"kept"}
    hub.repositories["me/model"] = {"config.json": other, **stale}
    refused = push(hub, export)
    assert refused.returncode == 2 and "another model (Qwen3ForCausalLM)" in refused.stderr
    assert push(hub, export, "--overwrite").returncode == 0
    files = hub.repositories["me/model"]
    assert "model-00009-of-00009.safetensors" not in files and "notes.md" in files
    assert push(hub, export).returncode == 0  # the same model again


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("me/model", None, "nobody is logged in"),
        ("me/model", "hf_" + "b" * 34, "does not accept this login"),
        ("others/model", TOKEN, "may not write to others/model"),
    ],
)
def test_a_login_that_will_not_do_is_one_sentence(hub, export, name, token, expected) -> None:
    done = push(hub, export, name=name, token=token)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not any(hub.repositories.values()) and hub.received == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", None, "no README.md"),
        ("README.md", "# A model\n", "names no licence"),
        ("README.md", CARD + "`/home/ana/data/el`", r"folder of this machine \(/home/ana/data/el\)"),
        ("README.md", CARD + "/lustre/project/el", r"\(/lustre/project/el\)"),
        ("generation_config.json", f'{{"key": "{TOKEN}"}}', "looks like a secret"),
        ("Modelfile", f"# {TOKEN}", "looks like a secret"),
        ("chat_template.jinja", "x" * (2 << 20) + f" {TOKEN}", "looks like a secret"),
    ],
)
def test_a_folder_that_is_not_for_others_is_refused(export, file, text, expected) -> None:
    (export / file).unlink() if text is None else (export / file).write_text(text)
    with pytest.raises(UserError, match=expected):
        Upload.of(export)


def test_no_file_of_another_folder_is_uploaded(export: Path, tmp_path: Path) -> None:
    names = "model-a/optimizer.safetensors", "sub/secret.gguf", ".git/x.gguf", "additional_chat_templates/a/b.jinja"
    for name in names:
        (export / name).parent.mkdir(parents=True)
        (export / name).write_text("x")
    upload = Upload.of(export)
    assert not {*names} & upload.files.keys() and {*names} < {*upload.left_out}
    (tmp_path / "outside").write_text("not for others")
    for name in ("LICENSE", "model-x.safetensors"):
        (export / name).symlink_to(tmp_path / "outside")
        with pytest.raises(UserError, match=name):
            Upload.of(export)
        (export / name).unlink()


def test_a_folder_without_a_model_and_a_wrong_name_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="contains no model"):
        Upload.of(tmp_path)
    with pytest.raises(UserError, match="must be OWNER/NAME"):
        check_name("model")
    with pytest.raises(UserError, match=r"refuses the card \(Invalid metadata in README.md. - x\)"), _explained("me/x"):
        raise ValueError("Invalid metadata in README.md.\n- x")
