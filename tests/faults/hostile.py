"""Files that run code in a reader that unpickles, imports or evaluates what it reads."""

import json
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch

from tests.faults.commands import COMMANDS
from tests.support.hf_models import RunsCode, replace_object

# Others read the same files with the same code, or more of them.
_LEFT_OUT = "preprocess a large file,merge large corpora,sample a large corpus,train on two ranks".split(",")
_LEFT_OUT += ["jsonl.gz", "jsonl.bz2", "corpus of en", "new tokens"]


@cache
def all_files(material: Path) -> list[tuple[str, str]]:
    """(command, file in its box)."""
    return [(name, file) for name in COMMANDS if name not in _LEFT_OUT for file in _files_read(name, material)]


def _files_read(name: str, material: Path) -> Iterator[str]:
    for item in COMMANDS[name].reads.split():
        source, _, target = item.partition(":")
        paths = sorted((material / source).rglob("*")) if (material / source).is_dir() else [material / source]
        for path in paths:
            if path.is_file() and "cache" not in path.parts:
                yield str(Path(target or source) / path.relative_to(material / source))


def choose(seed: int, number: int, material: Path) -> tuple[str, str, str]:
    """Command, file and payload: every pair of the first two once before any of them again."""
    pairs = list(all_files(material))
    Random(seed).shuffle(pairs)
    name, file = pairs[number % len(pairs)]
    return name, file, Random(f"{seed} {number}").choice([*_payloads(Path(file))])


def place(payload: str, path: Path, ran: Path, random: Random) -> None:
    """Write a file that creates `ran` if its code is run."""
    if path.name != "checksums.json":  # it would show the change, but an attacker would write a right one
        (path.parent / "checksums.json").unlink(missing_ok=True)
    _payloads(path)[payload](path, RunsCode(ran), random)


def _payloads(path: Path) -> dict[str, "Place"]:
    return _IN_ITS_PLACE | _OF_SUFFIX.get(path.suffix or path.name, {})


Place = Callable[[Path, RunsCode, Random], None]


def _pickle(path: Path, code: RunsCode, random: Random) -> None:
    path.write_bytes(pickle.dumps(code, protocol=random.choice([0, 2, 4])))


def _torch(path: Path, code: RunsCode, random: Random) -> None:
    with path.open("wb") as file:  # torch refuses some names
        torch.save({"weight": code}, file, _use_new_zipfile_serialization=random.random() < 0.5)


def _numpy(path: Path, code: RunsCode, random: Random) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([code], dtype=object), allow_pickle=True)


def _yaml_tag(path: Path, code: RunsCode, random: Random) -> None:
    with path.open("a") as file:
        file.write(f"\nmin-lr: !!python/object/apply:os.system ['touch {code.path}']\n")


def _pickles_beside(path: Path, code: RunsCode, random: Random) -> None:
    """Names that Megatron, transformers and PEFT know, in the folder of the file."""
    for name in ("common.pt", "pytorch_model.bin", "model.pt", "mp_rank_00/model_optim_rng.pt"):
        (path.parent / name).parent.mkdir(exist_ok=True)
        torch.save({"iteration": code}, path.parent / name)


def _table(path: Path, code: RunsCode, random: Random) -> None:
    """Code in the table of contents, or next to a true one."""
    metadata = pickle.loads(path.read_bytes())
    parts = ["planner_data", "storage_meta", "version", "state_dict_metadata", "storage_data"]
    setattr(metadata, random.choice(parts), code)
    path.write_bytes(pickle.dumps(metadata))


def _entry(path: Path, code: RunsCode, random: Random) -> None:
    """Code in the place of an object or a tensor of the step."""
    metadata = pickle.loads((path.parent / ".metadata").read_bytes())
    replace_object(path.parent, random.choice(sorted({index.fqn for index in metadata.storage_data})), [code])


def _own_module(path: Path, code: RunsCode, random: Random) -> None:
    """Settings that name a class of a file next to them."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = {}
    module = f"open('{code.path}', 'w')\nfrom transformers import Qwen2Config as Own, Qwen2ForCausalLM as Model\n"
    (path.parent / "own.py").write_text(module)
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Own", "own.Own"]}
    content |= {"auto_map": names, "tokenizer_class": "Own", "model_type": random.choice(["own", "qwen2"])}
    path.write_text(json.dumps(content))


# Payload -> how it is written, in the place of any file, or next to it; and for files of one suffix, or name.
_IN_ITS_PLACE: dict[str, Place] = {
    "pickle": _pickle,
    "torch archive": _torch,
    "numpy objects": _numpy,
    "pickles beside it": _pickles_beside,
}
_OF_SUFFIX: dict[str, dict[str, Place]] = {
    ".yaml": {"a YAML tag": _yaml_tag, "a second YAML tag": _yaml_tag},
    ".metadata": {"code in the table": _table, "other code in the table": _table},
    ".distcp": {"code as an entry": _entry, "code as another entry": _entry},
    ".json": {"a module of its own": _own_module},
}
