"""A weighted mean of the weights of two models: the cheapest way to forget less.

python -m examples.real_model.halfway BASE FINE_TUNED --save DIR
"""

from pathlib import Path

from moelpr.base.command import CommandParser, run_command
from moelpr.base.files import atomic_directory


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("models", nargs=2, type=Path, metavar="DIR", help="Hugging Face directories of the same shape")
    add("--save", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    add("--share", type=float, default=0.5, metavar="X", help="weight of the second (default: %(default)s)")
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"dtype": "float32", "local_files_only": True, "trust_remote_code": False}
    mean, other = (AutoModelForCausalLM.from_pretrained(folder, **options) for folder in args.models)
    found = other.state_dict()
    mean.load_state_dict(
        {name: torch.lerp(weight, found[name], args.share) for name, weight in mean.state_dict().items()}
    )
    with atomic_directory(args.save) as temporary:
        mean.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(args.models[0], local_files_only=True).save_pretrained(temporary)


if __name__ == "__main__":
    run_command(main)
