"""Add what post-training changed in a base to a model that was upcycled from this base, so that it can chat.

    moelpr model graft --base DIR --instruct DIR --model DIR --save DIR

Every tensor becomes MODEL + SCALE * (INSTRUCT - BASE), every expert with the difference of the FFN; routers are
unchanged. Tokenizer, chat template and generation settings come from the instruct model. Nothing is trained.
Weights stream, one tensor at a time.
"""

from typing import Annotated

from checkpoint_convert.card.graft_record import Only
from checkpoint_convert.common.settings import DtypeFlags
from checkpoint_convert.hf.hub import find_model
from moelpr.base.settings import Folder, number, run_script


class Settings(DtypeFlags):
    base: Folder  # the dense base: Hugging Face directory, or OWNER/NAME[@REVISION] on the Hub
    instruct: Folder  # the base after its post-training, likewise
    model: Folder  # export of the model that was upcycled from the base (moelpr model export), likewise
    scale: Annotated[float, number(float, above=0, below=10**9)] = 1.0  # factor of the difference
    only: Only = "all"  # parts that get it: the attention's projections, the FFNs, or all, with norms and embeddings


def main(args: Settings) -> None:
    base, instruct, model = map(find_model, (args.base, args.instruct, args.model))
    from checkpoint_convert.conversions.grafted_model import graft

    settings = args.scale, args.only, args.dtype
    reader = graft(base, instruct, model, args.save, *settings, overwrite=args.overwrite, verify=args.verify)
    added = f"{args.scale:g} * ({args.instruct} - {args.base})"
    print(f"{args.save}: {args.model} + {added}, {args.only}, {reader.dtype}")


if __name__ == "__main__":
    run_script(main)
