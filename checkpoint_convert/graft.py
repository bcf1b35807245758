"""Add what post-training changed in a base to a model that was upcycled from this base, so that it can chat.

    moelpr model graft --base DIR --instruct DIR --model DIR --save DIR

Every tensor becomes MODEL + SCALE * (INSTRUCT - BASE), every expert with the difference of the FFN; routers are
unchanged. Tokenizer, chat template and generation settings come from the instruct model. Nothing is trained.
Weights stream, one tensor at a time.
"""

from checkpoint_convert.card.graft_record import Only
from checkpoint_convert.common.settings import DtypeFlags
from checkpoint_convert.hf.hub import find_model
from moelpr.base.settings import Folder, Source, run_script
from moelpr.model.families.hf_config import read_config
from moelpr.model.model_spec import FILE_NAME as SPEC_FILE


class Settings(DtypeFlags):
    base: Folder  # the dense base: Hugging Face directory, or OWNER/NAME on the Hub
    instruct: Folder  # the base after its post-training: Hugging Face directory, or OWNER/NAME on the Hub
    model: Source  # export of the model that was upcycled from the base (moelpr model export)
    scale: float = 1.0  # factor of the difference
    only: Only = "all"  # parts that get it: the attention's projections, the FFNs, or all, with norms and embeddings


def main(args: Settings) -> None:
    base, instruct, model = map(find_model, (args.base, args.instruct, args.model))
    for one in (base, instruct, model):
        if not (one.folder / SPEC_FILE).is_file():
            read_config(one.folder)  # before torch is imported
    from checkpoint_convert.conversions.grafted_model import graft

    settings = args.scale, args.only, args.dtype
    reader = graft(base, instruct, model, args.save, *settings, overwrite=args.overwrite, verify=args.verify)
    added = f"{args.scale:g} * ({args.instruct} - {args.base})"
    print(f"{args.save}: {args.model} + {added}, {args.only}, {reader.dtype}")


if __name__ == "__main__":
    run_script(main)
