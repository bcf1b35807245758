"""Packs of languages for one base: FFNs with the sums by which routers are found, so that adding one needs no text.

A built model depends on base, kept sums and the set of packs only; to add or remove one, build again (docs/combine.md).
"""

import argparse
import sys
from pathlib import Path
from typing import Annotated

from checkpoint_convert.common.settings import MoeClassFlags, TextSettings, named_texts
from checkpoint_convert.hf.hub import find_model
from moelpr.base.errors import UserError
from moelpr.base.languages import is_code
from moelpr.base.settings import POSITIONAL, Flags, Folder, metavar
from moelpr.measure.evaluate.settings import Source


def _pack(text: str) -> Path:
    if not Path(text, "pack.json").is_file():
        raise argparse.ArgumentTypeError(f"must be a folder of moelpr pack make or keep, but {text} has no pack.json")
    return Path(text)


_Pack = Annotated[Path, {"type": _pack, "metavar": "DIR"}]


class _CardSettings(TextSettings):
    base: Annotated[Folder, POSITIONAL, metavar("BASE")]  # dense base: a folder, or OWNER/NAME[@REVISION] on the Hub
    license: str = ""  # license of what is written, as the Hub names it, for example apache-2.0
    base_model: str = ""  # name of the base on the Hub, for the card (default: BASE, or its folder's name)


class MakeSettings(_CardSettings):
    # model that was trained from it in its FFNs only, as for moelpr model combine
    expert: Annotated[Source, POSITIONAL, metavar("EXPERT")]
    text: Annotated[list[str], {"action": "extend"}, metavar("LANGUAGE=FILE")]  # text of each language of the pack
    trained: str = ""  # how the FFNs were trained, for readers


class KeepSettings(_CardSettings):
    # text that should stay as the base has it; each file is a text, named like it
    text: Annotated[list[str], {"action": "extend"}, metavar("[NAME=]FILE")]


class BuildSettings(MoeClassFlags):
    base: Annotated[Folder, POSITIONAL, metavar("BASE")]  # dense base: a folder, or OWNER/NAME[@REVISION] on the Hub
    packs: Annotated[list[_Pack], POSITIONAL, metavar("PACK")]  # folders of moelpr pack make
    kept: _Pack  # folder of moelpr pack keep


class ShowSettings(Flags):
    pack: Annotated[_Pack, POSITIONAL, metavar("PACK")]  # folder of moelpr pack make or keep


def make(args: MakeSettings) -> None:
    """Pack the FFNs of a model.

    moelpr pack make Qwen3-0.6B runs/el --text el=el.jsonl --license apache-2.0 --save packs/el
    """
    for name, path in named_texts(args.text, "--text").items():
        if not is_code(name):
            raise UserError(f"--text: {name} is not the code of a language; write --text LANGUAGE={path}, such as el=…")
    _make(args, args.expert, args.trained)


def keep(args: KeepSettings) -> None:
    """Sum up text to keep, once for a base.

    moelpr pack keep Qwen3-0.6B --text en=en.jsonl 'other/*.jsonl' --save packs/kept
    """
    _make(args, None)


def build(args: BuildSettings) -> None:
    """Make the model of a base and packs.

    moelpr pack build Qwen3-0.6B packs/el packs/hu --kept packs/kept --save model
    """
    from checkpoint_convert.conversions.packs import build_model

    model = build_model(find_model(args.base).folder, args.kept, args.packs, args)
    print(f"{args.save}: {args.base} and the packs {', '.join(model.packs)}")


def show(args: ShowSettings) -> None:
    """Check a pack, and print what it is."""
    from checkpoint_convert.conversions.packs import read_pack, read_sums

    pack = read_pack(args.pack)
    print(f"base: {pack.base} (SHA-256 of its tensors: {pack.base_sha256})")
    print(f"languages: {', '.join(pack.languages) or 'none: sums of text to keep'}")
    print(f"held out: {', '.join(f'{text} {tokens:,} tokens' for text, tokens in pack.texts.items())}")
    if pack.losses:
        print(f"loss on it: {pack.losses[0]:.3f} → {pack.losses[1]:.3f} nats per token")
        print(f"license: {pack.license or 'not given'}\ntrained: {pack.trained or 'not given'}")
    print(f"layers with sums: {sum(1 for _ in read_sums(args.pack))}")


def _make(args: MakeSettings | KeepSettings, expert: Path | None, trained: str = "") -> None:
    texts = args.read(named_texts(args.text, "--text"))  # before torch is imported
    base = find_model(args.base)
    from checkpoint_convert.conversions.packs import make_pack

    record = make_pack(base.folder, args.base_model or base.name, expert, texts, args, args.license, trained)
    of_loss = f", loss {record.losses[0]:.3f} → {record.losses[1]:.3f}" if record.losses else ""
    print(f"{args.save}: {', '.join(record.texts)} for {record.base}{of_loss}")
    if record.losses and record.losses[1] >= record.losses[0]:
        why = f"{expert} has not learned {', '.join(record.texts)}"
        print(f"warning: {why}; pass BASE before EXPERT, and text like what it trained on", file=sys.stderr)
