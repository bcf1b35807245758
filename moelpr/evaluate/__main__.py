"""What a model has learned: its bits per byte, where its tokens go, and its scores on benchmarks.

python -m moelpr.evaluate --model base=DIR --model stage2=DIR --data en=en.jsonl --data el=el.jsonl
python -m moelpr.evaluate routing --model stage2=DIR --data en=en.jsonl --data el=el.jsonl --original-languages en
python -m moelpr.evaluate harness --model base=DIR --model stage2=DIR --languages en,el --original-languages en
"""

import sys
from importlib import import_module

from moelpr.errors import UserError, run_command

# Each has a module of its own, which is imported when its command is given.
COMMANDS = {
    "routing": "moelpr.evaluate.routing_command",
    "harness": "moelpr.evaluate.harness.command",
}


def main() -> None:
    name, rest = sys.argv[1:2], sys.argv[2:]
    if name == ["report"]:
        raise UserError("the report is a command of its own: python -m moelpr.report RUN")
    if name and name[0] in COMMANDS:
        import_module(COMMANDS[name[0]]).main(rest)
    else:
        import_module("moelpr.evaluate.text_command").main(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
