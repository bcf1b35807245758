"""adapter_config.json, the settings of an adapter of the published MoE-LPR code."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from moelpr.process.errors import UserError
from moelpr.store import records
from moelpr.store.records import FOREIGN


def _at_least_2(topk: int) -> int:
    if topk == 1:
        raise UserError("topk must be at least 2 (with 1, the published code computes another model), got 1")
    return topk


@dataclass(frozen=True, config=FOREIGN)
class AdapterConfig:
    """The settings in adapter_config.json, under the names of the published code; those for training have defaults.

    Attributes:
        num_experts: E, including the original expert.
        topk: K.
        layers_to_transform: 0-based numbers of the MoE layers.
        base_model_name_or_path: Name or path of the dense model, if the adapter names one.
        save_all_params: Whether everything was trained, and saved.
    """

    FILE_NAME: ClassVar[str] = "adapter_config.json"

    num_experts: int
    topk: Annotated[int, AfterValidator(_at_least_2)]
    layers_to_transform: list[int]
    base_model_name_or_path: str | None = None
    peft_type: Literal["MOE"] = "MOE"
    auto_mapping: Any = None
    aux_loss_coef: Any = None
    inference_mode: Any = True
    init_moe_weights: Any = True
    lpr_loss_coef: Any = None
    revision: Any = None
    save_all_params: Any = False
    task_type: Any = "CAUSAL_LM"

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Read adapter_config.json; UserError if `folder` is not an adapter of the published code."""
        path = folder / cls.FILE_NAME
        if not path.is_file():
            raise UserError(f"{folder} is not an adapter: it has no {cls.FILE_NAME}; pass the folder that PEFT saved")
        return records.read(cls, path, "pass an adapter of the published MoE-LPR code")

    def write(self, folder: Path) -> None:
        """Write all settings."""
        (folder / self.FILE_NAME).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")
