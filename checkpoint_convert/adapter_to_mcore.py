"""Combine an adapter of the published MoE-LPR code and its dense model to a Megatron checkpoint.

    moelpr model import-adapter --adapter DIR --hf-path BASE --save DIR

Routers and new experts come from the adapter, everything else from the base. Weights stream, one tensor at a time.
"""

from pathlib import Path

from checkpoint_convert.common.arguments import add_output_options
from moelpr.base.command import CommandParser, run_command


def main() -> None:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    adapter = "folder with adapter_config.json and adapter_model.safetensors"
    add("--adapter", type=Path, required=True, metavar="DIR", help=adapter)
    add("--hf-path", type=Path, required=True, metavar="DIR", help="Hugging Face directory of its dense base model")
    add_output_options(parser, "checkpoint folder", dtype_default="that of the tensors of both")
    args = parser.parse_args()
    from checkpoint_convert.conversions.published_adapter import AdapterConfig, adapter_to_mcore

    spec = adapter_to_mcore(args.adapter, args.hf_path, args.save, args.dtype, args.overwrite, args.verify)
    assert spec.moe is not None
    named = AdapterConfig.read(args.adapter).base_model_name_or_path
    print(
        f"{args.save}: {spec.family}, {spec.dtype}, {spec.moe.num_experts} experts, top-{spec.moe.topk}; "
        f"base {args.hf_path} (in the adapter: {named or 'not named'})"
    )


if __name__ == "__main__":
    run_command(main)
