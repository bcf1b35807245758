"""Weights from a chain of checkpoints into model chunks, and chunks that save only what they train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedStateDict
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from moelpr.errors import UserError
from moelpr.torch_dist import read_metadata

# Loads the entries of a sharded state dict from one step folder, as dist_checkpointing.load does.
Loader = Callable[[ShardedStateDict, str], dict[str, Any]]

_LOAD_ERRORS = (OSError, RuntimeError, KeyError, ValueError, CheckpointingException, CheckpointException)


def load_weights(
    chunks: list[GPTModel], links: list[Path], only_frozen: bool = False, load: Loader = dist_checkpointing.load
) -> None:
    """Fill this rank's share of the model from the step folders `links`, each tensor from the first that has it.

    Element types are converted to the model's. Every rank must call this.

    Args:
        only_frozen: leave alone what trains.

    Raises:
        UserError: a tensor is in none of the folders, or has another shape.
    """
    wanted: dict[str, ShardedStateDict] = {}
    for index, chunk in enumerate(chunks):
        trains = trained_entries(chunk)
        wanted[f"model{index}"] = {
            name: entry for name, entry in chunk.sharded_state_dict().items() if not (only_frozen and trains(name))
        }
    for link in links:
        try:
            keys = set(read_metadata(link).state_dict_metadata)
            here = {
                model: {name: entry for name, entry in entries.items() if _key(entry) in keys}
                for model, entries in wanted.items()
            }
            loaded = load(here, str(link))
            for index, chunk in enumerate(chunks):
                chunk.load_state_dict(loaded.get(f"model{index}", {}), strict=False)  # a link may have nothing for it
        except _LOAD_ERRORS as error:
            raise UserError(f"the checkpoint {link} does not fit its model_spec.json: {_one_line(error)}") from error
        wanted = {
            model: {name: entry for name, entry in entries.items() if _key(entry) not in keys}
            for model, entries in wanted.items()
        }
    # Scales of FP8 modules are there only if FP8 was used.
    missing = [name for entries in wanted.values() for name in entries if not name.endswith("_extra_state")]
    if missing:
        raise UserError(
            f"the checkpoint {' with '.join(map(str, links))} lacks {missing[0]}"
            f"{f' and {len(missing) - 1} more tensors' if missing[1:] else ''}; copy it anew or convert the model again"
        )


def save_trained_only(chunks: list[GPTModel]) -> None:
    """From now on the chunks' sharded state has only what trains, so that Megatron saves and loads nothing else."""
    for chunk in chunks:
        _leave_out_frozen(chunk)


def trained_entries(chunk: GPTModel) -> Callable[[str], bool]:
    """A function that says of a name in the chunk's state dict whether it trains or belongs to a module that does."""
    trains = {name: parameter.requires_grad for name, parameter in chunk.named_parameters()}
    modules = {name.rpartition(".")[0] for name, is_trained in trains.items() if is_trained}
    return lambda name: trains.get(name, name.rpartition(".")[0] in modules)


def _leave_out_frozen(chunk: GPTModel) -> None:
    trains, whole_state, load_state = trained_entries(chunk), chunk.sharded_state_dict, chunk.load_state_dict

    def trained_state(*args: Any, **kwargs: Any) -> ShardedStateDict:
        state = {name: entry for name, entry in whole_state(*args, **kwargs).items() if trains(name)}
        # Megatron expects to get a state back for every chunk, and empty ones get lost on the way.
        return state or {"nothing_trains": LocalNonpersistentObject(None)}

    def load_trained(state: dict[str, torch.Tensor], strict: bool = True, assign: bool = False) -> Any:
        return load_state(state, strict=False, assign=assign)

    chunk.sharded_state_dict = trained_state
    chunk.load_state_dict = load_trained


def _key(entry: Any) -> str:
    return entry.unique_key if isinstance(entry, ShardedObject) else entry.key


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
