"""Routers as others find them, or with other text to keep, for the base's FFNs and those of a project.

    python -m examples.experiments.routers examples/experiments/first/second-ffn.yaml runs/experiments/first/NAME.yaml

The second file is the first with an output of its own; its name says whose routers.
"""

import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import torch
import yaml

from checkpoint_convert.common.settings import CombineSettings, MoeClassFlags
from checkpoint_convert.conversions.combined_model import Base, TopOne, combine, open_expert, write_combined
from checkpoint_convert.conversions.packs import PackedModel
from examples.demo_tasks import ROOT
from examples.languages import ORIGINAL
from moelpr.base.checksums import Verify
from moelpr.base.command import CommandParser, run_command
from moelpr.base.files import atomic_directory, write_text
from moelpr.data.text.reading import read_documents
from moelpr.measure.evaluate.calibration import Reader, read_inputs
from moelpr.measure.evaluate.divergence import distance, mean_loss, remembering
from moelpr.measure.evaluate.models import open_model
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject

TOKENS = 1024  # the number of each text, as moelpr model combine takes
RIDGE = 1e-6  # DUME's λ of 0.01, for domains of 10,000 tokens
PROMPTS, CHARACTERS = 5, 60  # prompts of each text, and their length


def write_dume(base: Path, ffns: Path, kept: dict[str, list[str]], new: dict[str, list[str]], output: Path) -> None:
    """Write the model with routers as DUME finds them (arXiv 2603.29765; code at gensyn-ai/dume).

    A ridge regression per layer predicts the domain of a token, text to keep or new text, as one-hot label, from all
    tokens, as the FFNs of their domain read them. Domains count the same. The larger value decides: no threshold, no
    search, one round. DUME's mean of all other weights does not apply, as they are the base's, nor its equal length of
    rows, as those of two domains are opposite. Its bias, which no stock class has, is folded into the rows: a fit
    without bias is that with the bias times the direction that is nearest to 1.
    """
    dense = Base.open(base, Verify.FULL)
    expert = open_expert(dense, ffns, [*new], ignore_others=False, verify=Verify.FULL)
    with open_model(base) as loaded:
        model, rows = TopOne(loaded, dense, [expert]), dict[int, torch.Tensor]()
        one, other = (read_inputs(model.reader(n, base), texts, TOKENS, True) for n, texts in enumerate((kept, new)))
    for layer in one.gram:
        gram_HH = (one.gram[layer] + other.gram[layer]).double().cpu()
        means_H2 = torch.stack([one.mean[layer], other.mean[layer]], dim=1).double().cpu()
        rows[layer] = torch.linalg.solve(gram_HH + RIDGE * torch.eye(len(gram_HH)), means_H2).T
    record = PackedModel((base.name, ""), [*kept], {ffns.name: [*new]})
    write_combined(dense, [expert], rows, "Routers as DUME finds them.\n", record, MoeClassFlags(save=output))


def write_mergekit(base: Path, ffns: Path, kept: dict[str, list[str]], new: dict[str, list[str]], output: Path) -> None:
    """Let mergekit-moe write the model: a row is the mean state of the last token of prompts, starts of documents."""
    experts = []
    for model, texts in ((base, kept), (ffns, new)):
        prompts = [document[:CHARACTERS] for documents in texts.values() for document in documents[:PROMPTS]]
        experts.append({"source_model": str(model), "positive_prompts": prompts})
    recipe = {"base_model": str(base), "gate_mode": "hidden", "dtype": "float32", "experts_per_token": 1}
    write_text(file := output.with_name("recipe.yaml"), yaml.safe_dump(recipe | {"experts": experts}))
    subprocess.run([ROOT / "launch/extend_venv.sh", "mergekit"], check=True)
    with atomic_directory(output) as folder:
        subprocess.run([ROOT / ".venv-mergekit/bin/mergekit-moe", file, folder], check=True)


def write_auto(base: Path, ffns: Path, kept: dict[str, list[str]], new: dict[str, list[str]], output: Path) -> None:
    """Write the model with the routers of a project with `kept: auto`: its text, and that of original languages."""
    folder = output.with_name("kept")
    flags = ["--without", ",".join((*ORIGINAL, *new)), "--overwrite"]
    subprocess.run([sys.executable, "-m", "moelpr", "data", "kept", "--save", str(folder), *flags], check=True)
    texts = {code: kept[code] for code in ORIGINAL}
    texts |= {file.stem: read_documents(file, max_documents=TOKENS) for file in sorted(folder.glob("*.jsonl"))}
    combine(base, {ffns: [*new]}, texts, new, CombineSettings(save=output))


def show(base: Path, model: Path, kept: dict[str, list[str]], new: dict[str, list[str]]) -> None:
    """Print what a model does on the held-out parts of texts, as `moelpr model combine` measures it."""
    with open_model(base) as dense, open_model(model) as routed:
        of_kept, of_new = (read_inputs(Reader(dense, {}), texts, TOKENS, True).pieces for texts in (kept, new))
        first = remembering(dense)
        nats = fmean(distance(first, routed, pieces) for pieces in of_kept.values())
        loss = fmean(mean_loss(routed, pieces) for pieces in of_new.values())
    print(f"{model}: {nats:.3f} nats per token from the base on text to keep, loss of new languages {loss:.3f}")


ROUTERS = {"dume-routers": write_dume, "mergekit-routers": write_mergekit, "auto-kept": write_auto}


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE", help="the project of the FFNs, and that to make")
    ours, its = (ResolvedProject(read_project(file)) for file in parser.parse_args().files)
    texts = {code: one.text[0] for code, one in ours.languages.items()} | ours.kept
    kept = {name: read_documents(path, max_documents=TOKENS) for name, path in texts.items()}
    new = {code: kept.pop(code) for code in ours.expanded}
    if not its.export.exists():
        ROUTERS[re.sub("-seed.*|-longer", "", its.file.path.stem)](
            ours.base, ours.trained_by("ffn"), kept, new, its.export
        )
        show(ours.base, its.export, kept, new)


if __name__ == "__main__":
    run_command(main)
