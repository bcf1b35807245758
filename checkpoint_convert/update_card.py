"""Complete the model card of an export with evaluation results and metadata, so that it can be uploaded as it is.

    moelpr model card DIR --results runs/evaluation/results.json

The results become the card's model-index, and their languages the model's. `moelpr model push DIR
OWNER/NAME` uploads it.
"""

from typing import Annotated

from moelpr.base.errors import UserError
from moelpr.base.settings import POSITIONAL, File, Flags, Folder, Names, metavar, run_script


class Settings(Flags):
    folder: Annotated[Folder, POSITIONAL]  # folder written by moelpr model export or moelpr model graft
    results: list[File] = []  # JSON of moelpr evaluate, of held-out text or of the harness
    evaluated: str | None = None  # the model's name in the results (default: the one evaluated from DIR)
    base_model: Annotated[str | None, metavar("OWNER/NAME")] = None  # base on the Hugging Face Hub
    languages: Names = []  # codes of languages to add
    license: str | None = None  # license, as the Hugging Face Hub names it, for example apache-2.0
    tags: Names = []  # tags to add


def main(args: Settings) -> None:
    from checkpoint_convert.card.evaluation_results import update_card
    from checkpoint_convert.hf.model_files import CARD_FILE

    if not any(value for name, value in vars(args).items() if name != "folder"):
        raise UserError("nothing to add; pass --results, --base-model, --languages, --license or --tags")
    metadata = update_card(
        args.folder, args.results, args.evaluated, args.base_model, args.languages, args.license, args.tags
    )
    data_sets = {result.unique_identifier for result in metadata.eval_results or []}
    missing = [key for key in ("base_model", "language", "license") if not metadata.get(key)]
    note = f"; without {', '.join(missing)}" if missing else ""
    print(f"{args.folder / CARD_FILE}: results on {len(data_sets)} data sets{note}")


if __name__ == "__main__":
    run_script(main)
