"""Find the routers of an export again, so that text of no expanded language goes to the original expert.

    moelpr model calibrate --model runs/stage2-hf --base Qwen3-0.6B --expanded-languages el,hu \\
        --data el=el.jsonl --data hu=hu.jsonl --data en=en.jsonl --data 'other/*.jsonl' --save runs/calibrated-hf

Review shows routers a little text of the original languages; what else the base can do, they have not seen. This gives
the router's rows of the original expert's copies, in every layer, the direction that best tells all other text of
--data from that of the expanded languages. No gradient, a few thousand tokens of each text are enough. Pass text in
many languages, code and dialogues. Only routers change, and the model stays of its stock class.
"""

import sys
from typing import Annotated

from checkpoint_convert.common.settings import RoutingSettings, named_texts
from moelpr.base.errors import UserError
from moelpr.base.settings import REPEATED, metavar, run_script
from moelpr.measure.evaluate.settings import HfFolder, Languages

FAR_FROM_BASE = 0.2  # nats per token; it was at most 0.07 on models that calibration served well, and 0.5 on another


class Settings(RoutingSettings):
    model: HfFolder  # export with as many copies of the original expert as choices (moelpr model export)
    base: HfFolder  # the dense base that it was upcycled from
    # JSON lines or Parquet, a file, folder or pattern; without NAME=, each file is a text; repeat for several texts,
    # which count the same
    data: Annotated[list[str], REPEATED, metavar("[NAME=]FILE")]
    expanded_languages: Languages  # languages of --data that were added; all other --data is text to keep


def main(args: Settings) -> None:
    files = named_texts(args.data, "--data")
    languages = args.expanded_languages
    if missing := [name for name in languages if name not in files]:
        raise UserError(f"--expanded-languages {','.join(missing)} must be among --data ({', '.join(files)})")
    if not languages or len(languages) == len(files):
        what = "text to keep" if languages else "an expanded language"
        raise UserError(f"--data has no text of {what}; pass text of both kinds, and name the expanded languages")
    texts = args.read(files)  # before torch is imported
    from checkpoint_convert.conversions.calibrated_model import write_calibrated

    kept = {name: documents for name, documents in texts.items() if name not in languages}
    record = write_calibrated(args.model, args.base, kept, {name: texts[name] for name in languages}, args)
    print(record.table())
    print(f"{args.save}: {args.model} with calibrated routers")
    if args.max_distance is None and (distance := record.findings.result.distance) > FAR_FROM_BASE:
        print(
            f"warning: calibrated routers are still {distance:.2f} nats per token from the base on text to keep, more "
            f"than {FAR_FROM_BASE:g}: one direction does not tell these texts apart; review may keep more (in "
            "languages.yaml, remove replay: none)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_script(main)
