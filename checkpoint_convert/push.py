"""Upload an export, a graft, its GGUF files or a pack of languages to the Hugging Face Hub.

    moelpr model push EXPORT OWNER/NAME --dry-run
    moelpr model push EXPORT OWNER/NAME

--dry-run prints the files with their sizes and the head of the model card, and sends nothing. The repository is private
unless --public is given. Only a model's own files are uploaded, none with a secret or a path of this machine; an
interrupted upload resumes when the command is run again.
"""

from pathlib import Path
from typing import Annotated

from moelpr.base.machine import format_bytes
from moelpr.base.settings import POSITIONAL, Flags, metavar, run_script
from moelpr.base.text_tables import table_text


class Settings(Flags):
    folder: Annotated[Path, POSITIONAL]  # folder written by moelpr model export, graft or gguf, or pack make
    repository: Annotated[str, POSITIONAL, metavar("OWNER/NAME")]  # model on the Hub, which may be new
    dry_run: bool = False  # show what would be uploaded, without asking the Hub
    public: bool = False  # let everybody see a new repository (default: private)
    overwrite: bool = False  # replace another model in the repository
    allow_paths: bool = False  # upload files that name folders of this machine


def main(args: Settings) -> None:
    from checkpoint_convert.card.upload import Upload, check_name

    check_name(args.repository)
    upload = Upload.of(args.folder, args.allow_paths)
    total = format_bytes(sum(upload.files.values()))
    if args.dry_run:
        print(f"to {args.repository}, {'public' if args.public else 'private'}, if it is new: {total}")
        print(table_text(("file", "size"), [(name, format_bytes(size)) for name, size in upload.files.items()]))
        print("\nThe head of README.md:\n")
        print("\n".join(upload.card.content.splitlines()[:40]))
    else:
        address = upload.send(args.repository, not args.public, args.overwrite)
        print(f"{address}: {len(upload.files)} files, {total}")
    missing = [key for key in ("base_model", "language", "model-index") if not upload.card.data.to_dict().get(key)]
    if missing:
        print(f"note: the card has no {', '.join(missing)}; moelpr model card adds them")
    if upload.left_out:
        print(f"note: not uploaded: {', '.join(upload.left_out[:5])}{' …' if len(upload.left_out) > 5 else ''}")


if __name__ == "__main__":
    run_script(main)
