"""Cases of what is around a command: shells, browsers, the Hub, the current folder, and a project's results."""

import asyncio
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import yaml

from moelpr.measure.chat.guard import Guard
from tests.faults.cases import Case, Outcome
from tests.faults.commands import COMMANDS, anything, launch, run, same_files, same_run
from tests.faults.processes import Failure, Running

# Parts of a value that a shell, a scheduler or YAML may take for more than text.
_PARTS = [*"\n\r\0\u2028\t;)`'\"\\#|%äa", "$(", "&&", "${IFS}"]
_TOKENS = ("hf_", "sk-", "AKIA", "ASIA", "ghp_", "github_pat_", "glpat-", "AIza", "api_org_", "https://u:", "password=")


def scripts(case: Case) -> Outcome:
    """A value of languages.yaml with characters of a shell: refused, or scripts that do not run it."""
    random = case.random
    case.prepare("scripts")
    content = yaml.safe_load((case.box / "project.yaml").read_text())
    value = "".join(random.choice([*_PARTS, " touch X ", "> X"]) for _ in range(random.randint(1, 7)))
    place = random.choice(["output", "language", "option", "value", "training", "step", "image", "apptainer", "mount"])
    case.notes.append(f"{place}: {value!r}")
    slurm: dict[str, Any] = {
        "option": {"options": {value: 1}},
        "value": {"options": {"partition": value}},
        "training": {"training": {"signal": value}},
        "step": {"steps": {"stage1": {value: value}}},
        "image": {"container_image": value},
        "apptainer": {"apptainer": value},
        "mount": {"container_image": "image", "container_mounts": [value]},
    }
    content |= {"output": value} if place == "output" else {"slurm": slurm.get(place, {})}
    if place == "language":
        content["languages"]["original"][value] = "text/en.jsonl"
    (case.box / "project.yaml").write_text(yaml.safe_dump(content, allow_unicode=random.random() < 0.5))
    ended = run(COMMANDS["scripts"], case.box)
    stubs = case.folder / "stubs"
    stubs.mkdir()
    for name in ("srun", "scontrol", "apptainer"):
        (stubs / name).write_text("#!/bin/sh\nexit 0\n")
        (stubs / name).chmod(0o755)
    for script in case.box.rglob("*.sbatch"):
        variables = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n"}
        variables["PATH"] = f"{stubs}:/usr/bin:/bin"
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(["bash", script], cwd=case.box, env=variables, capture_output=True, timeout=10)
    if actual := [*case.box.rglob("X")]:
        raise Failure(f"a script has run what is in a value: {actual[0]}")
    return case.judge(ended, anything, case.box)


def uploads(case: Case) -> Outcome:
    """A folder with something that is not for others: refused, or left out."""
    random = case.random
    case.prepare("push")
    export = case.box / "export"
    kind = random.choice(["secret", "secret", "link", "folder", "path", "code", "nothing"])
    name = random.choice(["README.md", "LICENSE", "chat_template.jinja", "Modelfile", "merges.txt"])
    if kind in ("secret", "path"):
        word = f"/{random.choice(['lustre', 'home', 'scratch1', 'gpfs', 'data'])}/a/b"
        if kind == "secret":
            word = random.choice(_TOKENS) + "".join(random.choices("ABCDEFGHIJKLMNOPQRST234567", k=48)) + "@"
            word = word[:20] if word.startswith("A") and not word.startswith("AIza") else word[:80]
        elif name == "merges.txt":
            name = "LICENSE"
        text = (export / name).read_text() if (export / name).exists() else ""
        (export / name).write_text(text + "\n" * random.choice([1, 1 << 21]) + f"{word} \n")
    elif kind == "link":
        name = random.choice(["LICENSE", "vocab.txt", "model-00009-of-00009.safetensors", "x.gguf"])
        (case.folder / "outside").write_text("not for others")
        (export / name).symlink_to(case.folder / "outside")
    elif kind == "folder":
        name = random.choice(["model-a/optimizer.safetensors", "sub/x.gguf", ".git/x.gguf"])
        (export / name).parent.mkdir()
        (export / name).write_text("not for others")
    elif kind == "code":
        name = random.choice(["config.json", "generation_config.json", "tokenizer_config.json"])
        content = json.loads((export / name).read_text()) if (export / name).exists() else {}
        key = random.choice(["auto_map", "custom_generate", "attn_implementation"])
        (export / name).write_text(json.dumps(content | {"part": {key: "a.B"}}))
    case.notes.append(f"{kind}: {name}")
    ended = run(COMMANDS["push"], case.box)
    if ended.code != (0 if kind in ("folder", "nothing") else 2) or name in ended.output.partition("note:")[0] * (
        kind == "folder"
    ):
        raise Failure(f"exit code {ended.code}:\n{ended.output[-500:]}{ended.last_words()}")
    return case.judge(ended, anything, case.box)


def files_beside(case: Case) -> Outcome:
    """A file of a module's name in the current folder is not imported by what moelpr starts."""
    name = case.random.choice(["preprocess a large file", "train on two ranks"])
    other = case.prepare(name)
    ran = case.folder / "ran"
    for module in ("yaml", "tokenize", "random", "torch", "json", "filelock"):
        (case.box / f"{module}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    command = COMMANDS[name]
    words = [sys.executable, "-P", "-m", "moelpr", "data", "preprocess", *command.words]
    started = launch(command, case.box, command.words) if command.script else Running.launched(words, case.box)
    ended = started.wait()
    if ran.exists():
        raise Failure("a file of the current folder was imported")
    return case.judge(ended, same_run if command.script else same_files, other)


# Step -> the files of its result, without which it is not done.
_RESULTS = {
    "export": "hf/*.safetensors hf/* hf",
    "evaluate": "evaluation/results.json evaluation",
    "routing": "evaluation/routing.json",
    "card": "hf/README.md",
    "report": "report.html",
}


def gone_results(case: Case) -> Outcome:
    """A finished project, copied, perhaps touched, of which a result is damaged: its step is to be done again."""
    case.prepare("finished")
    step = case.random.choice([*_RESULTS, ""])
    for path in case.box.rglob("*") if case.random.random() < 0.5 else ():
        path.touch()
    if step:
        pattern = case.random.choice(_RESULTS[step].split())
        path = case.random.choice(sorted((case.box / "project").glob(pattern)))
        ways = ["removed", "folder", "link", *(["cut"] if path.suffix == ".safetensors" else [])]
        case.notes.append(f"{path.name} {(way := case.random.choice(ways))}")
        if way == "cut":
            path.write_bytes(path.read_bytes()[: -case.random.randint(1, 1000)])
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if way == "folder":
            path.mkdir()
        elif way == "link":
            path.symlink_to("nowhere")
    ended = run(COMMANDS["finished"], case.box)
    again = {line.partition(":")[0] for line in ended.output.splitlines() if line.endswith(": again")}
    if step not in (again or {""}):
        raise Failure(f"to be done again: {', '.join(again) or 'nothing'}, not {step or 'nothing'}")
    ended.require_clean()
    return Outcome.RIGHT


_HOSTS = ["127.0.0.1", "localhost", "evil.example", "127.0.0.1.evil.example", "0.0.0.0", "[::1]", "", "evil@127.0.0.1"]
_READ = "/ /config /assets/index.js /gradio_api/heartbeat/a"
_REFUSED = "/gradio_api/upload /gradio_api//upload/ /upload /gradio_api/run/ask /gradio_api/call/ask /gradio_api/info"
_EVENTS = "/gradio_api/queue/join"
_EVENT = {"data": ["Hi", None, 8, 0], "fn_index": 0, "trigger_id": 1, "session_hash": "a"}


def pages(case: Case) -> Outcome:
    """A hundred requests to the chat page: only its own host and origin is answered, its own events, a megabyte."""
    random, most, port = case.random, 1 << 20, 7860
    for _ in range(100):
        host = random.choice(_HOSTS) + random.choice([f":{port}", f":{port}", "", ":80"])
        origins = [f"{scheme}://{random.choice(_HOSTS)}:{port}" for scheme in ("http", "https")]
        origin = random.choice(["", "null", *origins])
        path = random.choice([_EVENTS, *_READ.split(), *_REFUSED.split()])
        kind, method = random.choice(["http", "http", "websocket"]), random.choice(["GET", "POST", "HEAD", "PUT"])
        event = _EVENT | random.choice([{}, {}, {random.choice([*_EVENT]): random.choice([None, 9**9, [], {}])}])
        size = random.choice([0, 1, most, most + 1, 3 * most])
        body = json.dumps(event).encode()[: size or None].ljust(size)
        headers = {name: value for name, value in {"host": host, "origin": origin or None}.items() if value is not None}
        answered, received = asyncio.run(_ask({"type": kind, "method": method, "path": path}, headers, body))
        own = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        is_own = host in own and (not origin or (urlsplit(origin).netloc in own and origin.startswith("http:")))
        is_read, is_event = method in ("GET", "HEAD") and path in _READ.split(), (method, path) == ("POST", _EVENTS)
        is_event &= event in (_EVENT, _EVENT | {"trigger_id": 9**9}) and size != 1
        expected = kind == "http" and is_own and (is_read or is_event) and size <= most
        if answered != expected or received > most:
            case.notes.append(f"{kind} {method} {path} {headers}, {size} bytes of {event}")
            raise Failure(f"{'answered' if answered else 'refused'} after {received} bytes")
    return Outcome.RIGHT


async def _ask(scope: dict[str, Any], headers: dict[str, str], body: bytes) -> tuple[bool, int]:
    """Whether the page's application saw a request, and how many bytes of it."""
    seen = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(0)
        while (message := await receive())["type"] == "http.request":
            seen.append(len(message["body"]))
            if not message.get("more_body"):
                return

    parts = [body[start : start + (1 << 16)] for start in range(0, len(body), 1 << 16)] or [b""]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(_: Any) -> None:
        pass

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await Guard(application, "127.0.0.1", port=7860)(scope | {"headers": raw}, receive, send)
    return bool(seen), sum(seen)
