"""Combine a dense base and models of which only the FFNs were trained to one stock MoE, without training.

    moelpr model combine Qwen3-0.6B --expert el,hu=runs/el-hu --expert tr=runs/tr \\
        --text el=el.jsonl --text hu=hu.jsonl --text tr=tr.jsonl --keep-text en=en.jsonl 'other/*.jsonl' --save combined

A token uses one FFN per layer: the base's, or that of an expert, at the speed of the base. Routers are found in closed
form, of a few thousand tokens of each text (docs/combine.md). Where they choose the base's FFN, the model is the base.
"""

from pathlib import Path
from typing import Annotated

from checkpoint_convert.common.settings import CombineSettings, named_texts
from checkpoint_convert.hf.hub import find_model
from moelpr.base.errors import UserError
from moelpr.base.languages import check_name
from moelpr.base.settings import POSITIONAL, REPEATED, Folder, metavar, run_script
from moelpr.measure.evaluate.settings import languages as codes
from moelpr.model.families.hf_config import check_model


class Settings(CombineSettings):
    base: Annotated[Folder, POSITIONAL, metavar("BASE")]  # dense base: a folder, or OWNER/NAME[@REVISION] on the Hub
    # languages, and the folder of a model that was trained from the base in its FFNs only: a Hugging Face directory, a
    # LoRA adapter of peft, or a checkpoint of the trainer; repeat for several
    expert: Annotated[list[str], REPEATED, metavar("LANGUAGES=DIR")]
    # text of each language of --expert: JSON lines or Parquet, a file, folder or pattern
    text: Annotated[list[str], {"action": "extend"}, metavar("LANGUAGE=FILE")]
    # text that should stay as the base has it, in many languages and kinds; each file is a text, named like it
    keep_text: Annotated[list[str], {"action": "extend"}, metavar("[NAME=]FILE")]


def main(args: Settings) -> None:
    experts: dict[Path, list[str]] = {}
    for item in args.expert:
        names, _, folder = item.partition("=")
        for language in (languages := codes(names)):
            check_name(language)
        if not languages or not folder or Path(folder) in experts:
            raise UserError(f"--expert must be LANGUAGES=DIR, each folder once, got {item!r}")
        check_model(Path(folder))
        experts[Path(folder)] = languages
    listed = [language for languages in experts.values() for language in languages]
    texts, kept = named_texts(args.text, "--text"), named_texts(args.keep_text, "--keep-text")
    if sorted(listed) != sorted(texts):
        raise UserError(f"--text must have the languages of --expert ({', '.join(listed)}), got {', '.join(texts)}")
    expanded = {Path(path).resolve() for path in texts.values()}
    if both := [name for name, path in kept.items() if name in texts or Path(path).resolve() in expanded]:
        raise UserError(f"--keep-text {both[0]} is in an expanded language; remove it, or pass NAME=FILE of other text")
    documents = args.read(kept), args.read(texts)  # before torch is imported
    base = find_model(args.base)
    args.base_model = args.base_model or (base.name if base.revision else None)
    from checkpoint_convert.conversions.combined_model import combine

    record = combine(base.folder, experts, *documents, args)
    print(record.table())
    print(f"{args.save}: {args.base} and the FFNs of {', '.join(map(str, experts))}")
    if lacks := record.findings.shortcomings:
        remedy = "raise --max-tokens, set --keep or --max-distance, or train routers with method: review"
        print(f"Hardly worth serving: it {lacks}; {remedy}.")


if __name__ == "__main__":
    run_script(main)
