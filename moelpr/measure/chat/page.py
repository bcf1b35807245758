"""The page: a prompt, answers of one or two models as they are written, and the routes of the tokens."""

import socket
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.measure.chat.drawing import panel, routes_panel
from moelpr.measure.chat.guard import MOST_TEMPERATURE, MOST_TOKENS, Guard
from moelpr.measure.chat.routes import Token, answer, prompt_ids
from moelpr.measure.evaluate.models import LoadedModel

HOST = "127.0.0.1"  # no other machine can reach it
_FOLDER = Path(__file__).parent
_INTRO = """<div id="intro"><h1>Where do tokens go?</h1>
<p>Under each token, a cell per layer, the first on top: the gate weight of the original and of the new experts.</p>
<div class="legend">new <i></i> original</div></div>"""
_DETAIL = """<div id="detail" class="panel"><div class="title">Layer by layer</div>
<div class="rows">Point at a token, or choose one with the Tab key.</div></div>"""
_UPDATE_SECONDS = 0.25
_MOST_WAITING = 16  # prompts

Messages = list[dict[str, str]]


def check_page(port: int) -> None:
    """Raise a UserError if another program has the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}); pass another --port") from error


class Chat:
    """A conversation with an export, and the same one with its base."""

    def __init__(self, export: LoadedModel, base: LoadedModel | None):
        self._models = [export, *([base] if base else [])]

    def ask(self, prompt: str, histories: list[Messages], max_tokens: int, temperature: float) -> Iterator[list[Any]]:
        """Yield, as the answers grow, their panels, the map of tokens, and the histories with them."""
        asked = [[*history, {"role": "user", "content": prompt}] for history in histories]
        # Model → the prompt's tokens, then the answer's one by one.
        answer_steps: list[list[list[Token]]] = [[] for _ in self._models]
        try:
            prompts = [*map(prompt_ids, self._models, asked)]
        except UserError as error:
            yield [*self._shown(answer_steps, f"({error})"), histories]
            return
        histories = asked
        streams = [
            answer(model, ids, int(max_tokens), temperature) for model, ids in zip(self._models, prompts, strict=True)
        ]
        last = 0.0
        for steps in zip_longest(*streams):
            for tokens, step in zip(answer_steps, steps, strict=True):
                tokens += [step] if step else []
            if time.monotonic() - last > _UPDATE_SECONDS:
                last = time.monotonic()
                yield [*self._shown(answer_steps), histories]
        answers = ["".join(token.text for step in tokens[1:] for token in step) for tokens in answer_steps]
        for history, text in zip(histories, answers, strict=True):
            history.append({"role": "assistant", "content": text})
        yield [*self._shown(answer_steps, "(The answer ends at once.)"), histories]

    def _shown(self, answer_steps: list[list[list[Token]]], empty: str = "…") -> list[str]:
        """The panel of each model, and the map."""
        export, layers = self._models[0], sorted(self._models[0].routers)
        panels = []
        for title, model, tokens in zip(("Export", "Base"), self._models, answer_steps, strict=False):
            text = "".join(token.text for step in tokens[1:] for token in step)
            panels.append(panel(title, model.directory.name, text or empty))
        prompt, *steps = answer_steps[0] or [[]]
        parts = (("Prompt", prompt), ("Answer", [token for step in steps for token in step]))
        maps = [routes_panel(title, tokens, export.num_original_places, layers) for title, tokens in parts]
        return [*panels, "".join(maps)]

    def blocks(self) -> Any:
        """The page as Gradio's blocks."""
        import gradio as gr

        names = [model.directory.name for model in self._models]
        with gr.Blocks(title=f"moelpr chat: {names[0]}", analytics_enabled=False) as page:
            histories = gr.State([[] for _ in names])
            gr.HTML(_INTRO)
            with gr.Row():
                prompt = gr.Textbox(
                    show_label=False, placeholder="Type a prompt, and press Enter", scale=8, elem_id="prompt"
                )
                send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
                new = gr.Button("New chat", scale=1, min_width=110)
            empty = [panel(*pair, "The answer will be here.", True) for pair in zip(("Export", "Base"), names)]  # noqa: B905
            with gr.Row(equal_height=True):
                answers = [gr.HTML(text, elem_id=kind) for text, kind in zip(empty, ("export", "base"), strict=False)]
            with gr.Row():
                with gr.Column(scale=3):
                    maps = gr.HTML(elem_id="maps")
                with gr.Column(scale=1, min_width=280):
                    gr.HTML(_DETAIL)
            with gr.Accordion("Settings", open=False):
                max_tokens = gr.Slider(8, MOST_TOKENS, 128, step=8, label="Tokens of an answer, at most")
                temperature = gr.Slider(
                    0, MOST_TEMPERATURE, 0, step=0.1, label="Temperature (0: the most likely token)"
                )
            inputs, outputs = [prompt, histories, max_tokens, temperature], [*answers, maps, histories]
            for event in (prompt.submit, send.click):
                event(self.ask, inputs, outputs, concurrency_id="model", concurrency_limit=1)
            new.click(lambda: [*empty, "", [[] for _ in names], ""], None, [*outputs, prompt])
        return page

    def serve(self, port: int) -> None:
        """Serve the page until the process is stopped."""
        import gradio as gr
        from starlette.middleware import Middleware

        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        self.blocks().queue(max_size=_MOST_WAITING).launch(
            server_name=HOST,
            server_port=port,
            share=False,
            app_kwargs={"middleware": [Middleware(Guard, HOST, port)]},
            quiet=True,
            footer_links=[],
            ssr_mode=False,
            theme=gr.themes.Default(**fonts),
            css=(_FOLDER / "page.css").read_text(),
            head=f"<script>{(_FOLDER / 'page.js').read_text()}</script>",
        )
