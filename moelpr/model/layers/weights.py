"""Load model chunks from a chain of checkpoints, and save only what they train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedStateDict,
    ShardedTensorFactory,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch.distributed.checkpoint.api import CheckpointException

from moelpr.base.errors import UserError
from moelpr.model.checkpoints.torch_dist import read_metadata
from moelpr.model.megatron.replacing import replaces

# Loads the entries of a sharded state dict from one step folder, as dist_checkpointing.load does.
Loader = Callable[[ShardedStateDict, str], dict[str, Any]]

_LOAD_ERRORS = (OSError, RuntimeError, KeyError, ValueError, CheckpointingException, CheckpointException)


def load_weights(
    chunks: list[HybridModel], links: list[Path], only_frozen: bool = False, load: Loader = dist_checkpointing.load
) -> None:
    """Load this rank's part of the model. Every rank must call this.

    Args:
        chunks: the model; tensors are converted to its dtypes.
        links: step folders; each tensor is loaded from the first that has it.
        only_frozen: whether to skip parameters that train.

    Raises:
        UserError: a tensor is in none of the folders, or has another shape.
    """
    missing: dict[str, ShardedStateDict] = {}
    for index, chunk in enumerate(chunks):
        trains = trained_entries(chunk)
        missing[f"model{index}"] = {
            name: entry for name, entry in chunk.sharded_state_dict().items() if not (only_frozen and trains(name))
        }
    for link in links:
        try:
            keys = set(read_metadata(link).state_dict_metadata)
            here = {
                model: {name: entries.pop(name) for name in [*entries] if _keys(entries[name]) <= keys}
                for model, entries in missing.items()
            }
            loaded = load(here, str(link))
            for index, chunk in enumerate(chunks):
                chunk.load_state_dict(loaded.get(f"model{index}", {}), strict=False)  # a link may have no tensor of it
        except UserError:  # about a damaged file, which it names
            raise
        except _LOAD_ERRORS as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise UserError(f"the checkpoint {link} does not match its model_spec.json: {reason}") from error
    # FP8 scales exist only if FP8 was used.
    names = [name for entries in missing.values() for name in entries if "_extra_state" not in name]
    if names:
        raise UserError(
            f"the checkpoint {' with '.join(map(str, links))} lacks {names[0]}"
            f"{f' and {len(names) - 1} more tensors' if names[1:] else ''}; copy it or convert the model again"
        )


def omit_extra_state(chunks: list[HybridModel]) -> None:
    """Keep the `_extra_state` of Transformer Engine's modules, which is empty without FP8, out of checkpoints.

    A run can then resume with and without Transformer Engine. Loading is still strict, because every module gets its
    own empty state back.
    """

    def state_without_extra(full_state: Callable[..., ShardedStateDict], *args: Any, **kwargs: Any) -> ShardedStateDict:
        return {
            name: LocalNonpersistentObject(entry.data) if "_extra_state" in name else entry
            for name, entry in full_state(*args, **kwargs).items()
        }

    for chunk in chunks:
        if not chunk.config.fp8:
            replaces(chunk, "sharded_state_dict")(state_without_extra)


def trained_entries(chunk: HybridModel) -> Callable[[str], bool]:
    """A predicate on names in the chunk's state dict: True if the entry trains or belongs to a module that trains."""
    trains = {name: parameter.requires_grad for name, parameter in chunk.named_parameters()}
    modules = {name.rpartition(".")[0] for name, is_trained in trains.items() if is_trained}
    return lambda name: trains.get(name, name.rpartition(".")[0] in modules)


def save_trained_only(chunk: HybridModel) -> None:
    """Reduce the chunk's sharded state to what trains, so that Megatron saves and loads nothing else."""
    trains = trained_entries(chunk)

    @replaces(chunk, "sharded_state_dict")
    def trained_state(full_state: Callable[..., ShardedStateDict], *args: Any, **kwargs: Any) -> ShardedStateDict:
        state = {name: entry for name, entry in full_state(*args, **kwargs).items() if trains(name)}
        # Megatron expects a state for every chunk, but checkpoints drop empty ones.
        return state or {"nothing_trains": LocalNonpersistentObject(None)}

    @replaces(chunk, "load_state_dict")
    def load_trained(load: Callable[..., Any], state: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return load(state, strict=False, assign=assign)


def _keys(entry: Any) -> set[str]:
    """The keys of an entry in a checkpoint; a Gated DeltaNet splits a tensor into several."""
    if isinstance(entry, ShardedTensorFactory):
        return {part.key for part in nested_values(entry.build())}
    return {entry.unique_key if isinstance(entry, ShardedObject) else entry.key}
