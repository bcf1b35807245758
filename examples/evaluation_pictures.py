"""The pictures of docs/evaluation.md, from the demo's models and its held-out text.

    python examples/evaluation_pictures.py [--run runs/demo]

Runs the two commands that the page shows; what they measured stays in RUN/evaluation, so a second run is quick.
"""

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in examples/ only

from examples.demo import EXPANDED, ORIGINAL  # noqa: E402
from moelpr.errors import UserError, run_command  # noqa: E402
from moelpr.evaluate import routing_command, text_command  # noqa: E402

# Name in the output folder -> name beside the page.
PICTURES = {
    "change": "evaluation-change",
    "routing-stage1-original-first-share": "evaluation-prior-stage1",
    "routing-stage2-original-first-share": "evaluation-prior-stage2",
    "routing-stage2-experts": "evaluation-experts",
    "routing-stage2-load-imbalance": "evaluation-load",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the demo's folder (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    if not (arguments.run / "stage2-hf").is_dir():
        raise UserError(f"{arguments.run} holds no finished demo; run `make demo` first")
    output = arguments.run / "evaluation"
    text_command.main([*job(arguments.run, ("base", "full-finetune", "stage1", "stage2")), "--output", str(output)])
    routing_command.main([*job(arguments.run, ("stage1", "stage2")), "--output", str(output)])
    for source, target in PICTURES.items():
        shutil.copyfile(output / f"{source}.svg", ROOT / "docs/images" / f"{target}.svg")


def job(run: Path, models: tuple[str, ...]) -> list[str]:
    """Flags that name the models and the held-out text."""
    words = [word for model in models for word in ("--model", f"{model}={run}/{model}-hf")]
    for language in (*ORIGINAL, *EXPANDED):
        words += ["--data", f"{language}={run}/corpus/validation.{language}.jsonl"]
    return [*words, "--original-languages", ",".join(ORIGINAL), "--sequence-length", "128", "--context", "32"]


if __name__ == "__main__":
    run_command(main)
