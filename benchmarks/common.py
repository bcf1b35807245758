"""Parts that the benchmarks share: arguments, tables, tiny models, and corpora."""

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moelpr.model.stages import MoeStage

if TYPE_CHECKING:
    from moelpr.model.model_spec import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
STAGES: tuple[MoeStage, ...] = get_args(MoeStage)
SIZES = {
    "layers": "number of layers",
    "hidden": "hidden size",
    "ffn": "hidden size of each expert's FFN",
    "head": "size of each attention head",
    "new_experts": "number of new experts",
    "original_copies": "places of the dense FFN among the experts",
    "topk": "experts per token",
    "vocabulary": "vocabulary size, in tokens",
    "sequences": "sequences per step",
    "length": "sequence length, in tokens",
    "prompt": "tokens that are read",
    "written": "tokens that are written",
    "rounds": "number of measured rounds",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a docstring, and appends defaults except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def argument_parser(description: str | None, **sizes: int) -> argparse.ArgumentParser:
    """A parser with --json, and an integer option per size; keys are those of SIZES, values are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=SIZES[name])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE, as JSON")
    return parser


def add_cpu_time(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time, which other processes disturb less")


def write_json(result: object, file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(result, indent=2) + "\n")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print all texts and numbers of rows, texts aligned left and numbers right."""
    from moelpr.base.text_tables import table_text

    columns = [*dict.fromkeys(key for row in rows for key, value in row.items() if not hasattr(value, "keys"))]
    texts = [
        index for index, name in enumerate(columns) if all(isinstance(row.get(name, ""), str | bool) for row in rows)
    ]
    print(table_text(columns, ([_cell(row.get(name, "")) for name in columns] for row in rows), texts), end="\n\n")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.{0 if abs(value) >= 1000 else 3}f}"
    return f"{value:,}" if type(value) is int else str(value)


@contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """`folder`, created if it is missing, or a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def install_megatron() -> None:
    """Prepare Megatron for this machine and silence its log; call it before anything imports Megatron."""
    import logging

    from moelpr.model.megatron import bootstrap

    bootstrap.install_patches()
    logging.getLogger("megatron").setLevel(logging.ERROR)


def qwen2_config(
    layers: int, hidden: int, ffn: int, vocabulary: int, length: int, heads: int = 4, groups: int = 2, **others: Any
) -> Any:
    """transformers' Qwen2Config; `others` are fields of it."""
    from transformers import Qwen2Config

    fields = dict(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn, vocab_size=vocabulary)
    fields |= dict(max_position_embeddings=length, num_attention_heads=heads, num_key_value_heads=groups)
    return Qwen2Config(**fields | {"tie_word_embeddings": False, "eos_token_id": 0} | others)


def model_spec(
    config: Any, new_experts: int, topk: int = 2, dtype: str = "float32", original_copies: int = 1
) -> "ModelSpec":
    """The spec of a model with the shape of `config` whose layers are all MoE layers with one original expert."""
    from moelpr.model.families.families import family_of
    from moelpr.model.model_spec import ModelSpec, MoeSpec

    family, _ = family_of({"model_type": config.model_type})
    moe = MoeSpec(new_experts, topk, tuple(range(config.num_hidden_layers)), original_copies=original_copies)
    return ModelSpec(family.name, dtype, family.megatron_args(config), moe)


def save_random_model(config: Any, folder: Path) -> Path:
    """Write a random model as a Hugging Face directory, in shards of at most 1 GB."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder, max_shard_size="1GB")
    return folder


def upcycle(hf: Path, folder: Path, new_experts: int, random: bool = False, **choice: Any) -> Path:
    """Convert a Hugging Face directory into an upcycled Megatron checkpoint whose new experts are copies or random."""
    from checkpoint_convert.conversions.initialization import Start
    from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
    from moelpr.model.families.new_experts import NewExperts

    hf_to_mcore(hf, folder, NewExperts(new_experts, **choice), start=Start("random" if random else "copied"))
    return folder


def write_corpus(prefix: Path, vocab_size: int, documents: Iterable[tuple[Any, bool]]) -> Path:
    """Write a corpus of (token IDs, is original-language text); returns its prefix."""
    import numpy as np

    from data_tools.corpus.corpus_writer import CorpusWriter

    with CorpusWriter(prefix, vocab_size) as writer:
        for tokens, is_original in documents:
            writer.add_document(np.asarray(tokens, np.int32), is_original)
        writer.finalize()
        writer.commit()
    return prefix


def environment(**variables: str) -> dict[str, str]:
    """The environment for a process that imports this repository and must not hold a core while it waits."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    quiet = {"OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}
    return os.environ | quiet | {"PYTHONPATH": paths} | variables
