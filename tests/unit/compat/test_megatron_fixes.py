from pathlib import Path

import megatron.core

from moelpr.compat import megatron_fixes

DATASETS = Path(next(iter(megatron.core.__path__))) / "datasets"


def test_the_wheel_still_ships_a_built_helper_and_no_makefile() -> None:
    assert list(DATASETS.glob("helpers_cpp*.so"))
    assert not (DATASETS / "Makefile").exists(), "Megatron can build its helper itself: the fix may go"


def test_megatron_is_told_not_to_run_make(capfd) -> None:  # noqa: ANN001
    megatron_fixes.install()
    from megatron.core.datasets import utils

    utils.compile_helpers()
    assert "make" not in capfd.readouterr().err
