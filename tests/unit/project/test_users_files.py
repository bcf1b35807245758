"""The files of examples/ fit their hardware; README and the tutorials show them and their plans as they are."""

import re
from pathlib import Path

import pytest
import yaml

from tests.support import plan_pages
from tests.support.plan_pages import ROOT

FILES = {page: plan_pages.BLOCK.findall(page.read_text())[0][0] for page in plan_pages.PAGES}


def test_every_file_has_a_page() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples" / "users").glob("*.yaml")}
    assert set(FILES.values()) == names | {"examples/languages.yaml"}


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.stem)
def test_a_page_shows_its_file_and_its_plan(page: Path) -> None:
    shown = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)[0]
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / FILES[page]).read_text())
    assert page.read_text() == plan_pages.current(page), "run python -m tests.support.plan_pages"


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.stem)
def test_a_plan_says_that_it_fits_and_what_it_costs(page: Path) -> None:
    hardware = yaml.safe_load((ROOT / FILES[page]).read_text())["hardware"]
    [line] = re.findall(r"^(?:stage1|ffn) .*$", page.read_text(), re.MULTILINE)
    actual = re.search(r"([\d.]+) (?:hours|days) +([\d,]+) +([\d.]+) of (\d+) GiB(?: +\S+ \S+)+? +(\d+) GPU", line)
    assert actual, line
    time, gpu_hours, used, memory, gpus = (float(number.replace(",", "")) for number in actual.groups())
    hours = time * (24 if "days" in line else 1)
    assert used < 0.9 * memory and gpus == hardware["gpus"]
    assert gpu_hours == pytest.approx(hours * gpus, rel=0.01)
