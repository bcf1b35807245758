"""Convert a Hugging Face model to a Megatron checkpoint and upcycle its FFNs to experts.

    moelpr model convert --hf-path DIR --save DIR --num-new-experts 4 --topk 2

Experts 0 to K - 1 are the dense FFN, and N new experts start equal to it, so the model still computes what the dense
model did; tokens that choose only the first K keep the dense output. --original-copies 1 is the paper's single one.
With --extended-tokenizer DIR the vocabulary grows; logits of old tokens stay as they are on text without new ones.
Routers are initialized xavier-normal. A stock MoE, such as an earlier export, keeps its experts and gets N more.
Weights stream from safetensors to the checkpoint, one tensor at a time.
"""

from typing import Annotated, Literal

from checkpoint_convert.common.settings import DtypeFlags
from checkpoint_convert.hf.hub import find_model
from moelpr.base.errors import UserError
from moelpr.base.settings import Count, Flags, Folder, either, number, run_script
from moelpr.data.vocabulary_extension import VocabularyExtension
from moelpr.measure.evaluate.settings import HfFolder
from moelpr.plan.settings import ExpertFlags


class _InitializationFlags(Flags):
    """initialization of new experts"""

    new_experts: Literal["copied", "random"] = "copied"  # copies of the FFN (in an MoE: of expert 0), or an ablation
    # add noise to each copy, as a fraction of the standard deviation of its weights
    expert_noise: Annotated[float, number(float, 0)] = 0.0
    seed: int = 1234  # random seed
    ffns_of: HfFolder | None = None  # Hugging Face directory of a dense model, whose FFNs are copied instead


class Settings(DtypeFlags, _InitializationFlags, ExpertFlags):
    # folder of a Hugging Face model; or OWNER/NAME[@REVISION] on the Hub, which is downloaded, and its commit recorded
    hf_path: Folder
    # experts to add to each MoE layer
    num_new_experts: Annotated[Count | None, either("experts", required=True)] = None
    dense: Annotated[bool, either("experts", required=True)] = False  # add no experts: write a dense checkpoint
    # result of moelpr data extend-tokenizer, whose tokens get rows (default: the model's)
    extended_tokenizer: Folder | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.moe_layers or self.moe_every_k_layers
        starts = self.new_experts != "copied" or self.expert_noise or self.ffns_of
        if self.dense and (layers or self.topk or self.original_copies or starts):
            raise UserError(
                "--dense adds no experts; remove --topk, --original-copies and the options for layers and new experts"
            )


def main(args: Settings) -> None:
    model = find_model(args.hf_path)
    if args.extended_tokenizer:
        VocabularyExtension.read(args.extended_tokenizer)  # a wrong path is reported before torch is imported
    from checkpoint_convert.conversions.initialization import Start
    from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
    from moelpr.model.families.families import read_base

    start = Start(args.new_experts, args.expert_noise, args.seed, str(args.ffns_of) if args.ffns_of else None)
    number = args.num_new_experts
    experts = None if number is None else args.experts(number, read_base(model.folder)[1])
    settings = args.dtype, args.overwrite, model, args.extended_tokenizer, args.verify
    spec = hf_to_mcore(model.folder, args.save, experts, start, *settings)
    layout = "dense"
    if (moe := spec.moe) is not None:
        copies = f" with {moe.original_copies} copies of the dense FFN" if moe.original_copies > 1 else ""
        layout = (
            f"{moe.num_experts} experts ({moe.num_original_places} original{copies} + {moe.num_new_experts} new), "
            f"top-{moe.topk}, in {len(moe.layers)} of {spec.megatron_args['num_layers']} layers"
        )
    if spec.new_tokens is not None:
        layout += f", {spec.new_tokens.number} new tokens"
    print(f"{args.save}: {spec.family}, {spec.dtype}, {layout}")


if __name__ == "__main__":
    run_script(main)
