"""Talk to an export on a local page, and see which experts each token of prompt and answer passes.

    moelpr chat runs/stage2-hf --base Qwen3-1.7B-Base

The answer streams; under each token stands how much of the gate weight goes to original and to new experts, per layer.
With --base, the dense base answers next to it. The page is at http://127.0.0.1:7860 and only on this machine; nothing
is loaded from elsewhere or sent. Needs the extra `chat`. Ctrl-C ends it.
"""

import os
from contextlib import ExitStack
from typing import Annotated

from moelpr.base.errors import UserError
from moelpr.base.files import temporary_folder
from moelpr.base.settings import POSITIONAL, metavar
from moelpr.base.versions import require_package
from moelpr.measure.evaluate.settings import DeviceFlags, HfFolder


class Settings(DeviceFlags):
    export: Annotated[HfFolder, POSITIONAL, metavar("EXPORT")]  # folder written by moelpr model export or graft
    base: HfFolder | None = None  # Hugging Face directory of the dense base, which answers next to it
    port: int = 7860  # port of the page


def main(args: Settings) -> None:
    require_package("gradio", "chat")
    from moelpr.measure.chat.page import HOST, Chat, check_page
    from moelpr.measure.evaluate.models import open_model

    check_page(args.port)
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder("moelpr-chat"))
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
        export, *base = [
            stack.enter_context(open_model(folder, args.device, args.dtype, args.verify))
            for folder in (args.export, *filter(None, [args.base]))
        ]
        if not export.routers:
            raise UserError(f"{args.export} is a dense model, whose tokens have no experts; pass an upcycled one")
        print(f"http://{HOST}:{args.port} (Ctrl-C ends it)", flush=True)
        Chat(export, base[0] if base else None).serve(args.port)
