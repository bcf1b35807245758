"""Export a Megatron checkpoint as a Hugging Face model that stock transformers loads, without custom code.

    moelpr model export --load DIR --save DIR

A dense model is exported as its own class, an upcycled one as the stock MoE class of its family or as another that can
hold it (--as): docs/serving.md lists which programs run which class.
Weights stream from the checkpoint to safetensors, one tensor at a time.
"""

from typing import Annotated

from checkpoint_convert.common.settings import DtypeFlags
from checkpoint_convert.hf.model_files import DEFAULT_SHARD_BYTES
from moelpr.base.quantities import Bytes
from moelpr.base.settings import Folder, choices, run_script
from moelpr.measure.evaluate.settings import HfFolder
from moelpr.model.checkpoints.chain import checkpoint_chain
from moelpr.model.families.hf_config import read_config
from moelpr.model.families.moe_classes import MOE_CLASSES


class Settings(DtypeFlags):
    load: Folder  # checkpoint folder of a converter or the trainer
    iteration: int | None = None  # saved step to read (default: the latest)
    # size, e.g. 500MB (default: 5GB)
    max_shard_size: Bytes = DEFAULT_SHARD_BYTES
    base_model: str | None = None  # name of the base on the Hub, for the model card (default: the name of its folder)
    # stock MoE class to write (default: the family's)
    as_class: Annotated[str | None, choices(MOE_CLASSES), {"names": ["--as"]}] = None
    chat_template_from: Folder | None = None  # chat model whose template and settings the export gets (docs/chat.md)
    multimodal_base: HfFolder | None = None  # multimodal base (Qwen3.5), whose vision tower the export gets


def main(args: Settings) -> None:
    if args.chat_template_from:
        read_config(args.chat_template_from)
    checkpoint_chain(args.load, args.iteration)  # a wrong path is reported before torch is imported
    from checkpoint_convert.conversions.exported_model import mcore_to_hf

    settings = args.dtype, args.max_shard_size, args.overwrite, args.base_model, args.as_class
    others = args.verify, args.chat_template_from, args.multimodal_base
    facts = mcore_to_hf(args.load, args.save, args.iteration, *settings, *others)
    moe = facts.source.spec.moe
    experts = "dense" if moe is None else f"{moe.num_experts} experts, top-{moe.topk}"
    print(f"{args.save}: {facts.architecture}, {experts}, {facts.dtype}")
    print(facts.readers)


if __name__ == "__main__":
    run_script(main)
