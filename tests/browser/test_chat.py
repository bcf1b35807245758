"""The page of `moelpr chat`, in Chromium, without a network: type a prompt, read the answers, look at the routes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moelpr.measure.chat.page import Chat
from moelpr.measure.evaluate.models import load_model
from moelpr.model.families.new_experts import NewExperts
from tests.browser import chat_page
from tests.browser.browser import opened
from tests.support.hf_models import make_model, write_export  # noqa: F401

pytest.importorskip("gradio", reason="run by `make test-browser` in .venv-browser")
pytest.importorskip("playwright")


@pytest.fixture(scope="module")
def base(make_model) -> Path:  # noqa: F811
    return make_model("LlamaForCausalLM", tokenizer=True)


@pytest.fixture(scope="module")
def export(base: Path, tmp_path_factory) -> Path:
    return write_export(base, tmp_path_factory.mktemp("chat"), NewExperts(3), noise=0.5)


def test_a_prompt_is_answered_by_both_models_with_the_routes_of_its_tokens(export: Path, base: Path) -> None:
    with (
        chat_page.served(export, "--base", str(base)) as address,
        opened(address, chat_page.WIDTH) as (page, hosts, complaints),
    ):
        chat_page.ask(page, "aaab")
        chat = Chat(load_model(export, "cpu"), load_model(base, "cpu"))
        *_, (ours, theirs, maps, histories) = chat.ask("aaab", [[], []], 128, 0)
        assert [history[-1]["role"] for history in histories] == ["assistant", "assistant"]
        for place, expected in (("#export", ours), ("#base", theirs)):
            (text,) = re.findall(r'class="answer">(.*?)</div>', expected, re.DOTALL)
            assert page.inner_text(f"{place} .answer").strip() == text.strip()
        routes = re.findall(r'data-route="([^"]*)"', maps)
        actual = page.locator("#maps .token").evaluate_all("tokens => tokens.map(token => token.dataset.route)")
        assert actual == routes and len(routes) > 3
        # The table of a token has its layers, each with two experts whose weights are those of the route.
        page.locator("#maps .token").nth(1).hover()
        titles = page.locator("#detail .stack span").evaluate_all("bars => bars.map(bar => bar.title)")
        numbers = [float(title.split()[-1]) for title in titles]
        assert numbers == [float(part.split(":")[1]) for layer in routes[1].split(";") for part in layer.split(",")]
        assert {title.split(":")[0] for title in titles} == {f"layer {number}" for number in range(4)}
        for title, part in zip(titles, re.split("[;,]", routes[1]), strict=True):
            assert ("original 1" in title) == part.startswith("0:")
        assert page.evaluate("document.documentElement.scrollWidth") <= chat_page.WIDTH
        page.get_by_role("button", name="New chat").click()
        page.wait_for_function("document.querySelectorAll('#maps .token').length === 0")
        assert hosts <= {address.removeprefix("http://")} and complaints == []


def test_a_taken_port_and_a_dense_model_are_one_sentence(export: Path, base: Path, taken_port: int) -> None:
    taken = ([export, "--port", taken_port], f"port {taken_port} cannot be used")
    for words, expected in (taken, ([base], "dense model")):
        command = [sys.executable, "-m", "moelpr", "chat", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_only_the_page_itself_is_answered(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def status(address: str, *flags: str) -> str:
        words = ["curl", "--silent", "--retry", "60", "--retry-connrefused", "--output", "/dev/null"]
        return subprocess.run(
            [*words, "--write-out", "%{http_code}", *flags, address], capture_output=True
        ).stdout.decode()

    with chat_page.served(export) as address:
        assert status(f"{address}/config") == "200"
        assert status(f"{address}/config", "--header", "Host: evil.example:7860") == "403"
        assert status(f"{address}/config", "--header", "Origin: https://evil.example") == "403"
        assert status(f"{address}/gradio_api/upload", "--form", f"files=@{__file__}") == "403"
    assert not [*tmp_path.iterdir()]
