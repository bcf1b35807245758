import pytest

from moelpr.train.early_warnings import BLOCK, EarlyWarnings


def warnings_of(
    stage: str = "stage1", lpr: bool = False, first: int = 0, grace_s: float | None = None
) -> EarlyWarnings:
    return EarlyWarnings(stage, lpr, first, grace_s)


def validation(**losses: float | None) -> dict:
    groups = {"en": "original", "zh": "original", "el": "expanded"}
    results = {name: {"group": groups[name], "lm_loss": loss} for name, loss in losses.items()}
    return {"event": "validation", "languages": results}


IDLE, BUSY = [[1.0, 0.992, 0.008], [0.9, 0.6, 0.5]], [[1.0, 0.98, 0.02], [0.9, 0.6, 0.5]]
RISES, STAYS = ["original_loss_rises"], ["lpr_loss_stays"]


@pytest.mark.parametrize(
    ("settings", "name", "blocks"),
    [
        ({}, "token_share", [(IDLE, ["idle_expert"]), (IDLE, []), (BUSY, []), (IDLE, ["idle_expert"])]),
        ({"stage": "stage0"}, "token_share", [(IDLE, [])]),
        # An expert that tokens cannot choose is not idle.
        ({"first": 1}, "token_share", [([[0.0, 1.0, 1.0]], []), ([[0.0, 2.0, 0.0]], ["idle_expert"])]),
        ({}, "lm_loss_original", [(2.0, []), (2.1, []), (2.3, RISES)]),
        ({}, "lm_loss_original", [(None, [])]),
        (
            {"stage": "stage2", "lpr": True},
            "lpr_loss",
            [(1.0, []), (1.0, STAYS), (1.1, []), (0.5, []), (0.5, []), (0.995, STAYS)],
        ),
        ({"lpr": False}, "lpr_loss", [(1.0, []), (1.0, [])]),
    ],
)
def test_a_block_of_equal_steps_is_warned_of_at_its_onset(settings: dict, name: str, blocks: list[tuple]) -> None:
    watch = warnings_of(**settings)
    for value, expected in blocks:
        actual = [warning for _ in range(BLOCK) for warning in watch.step({"lm_loss": 2.0, name: value})]
        assert [warning.kind for warning in actual] == expected
        if value is IDLE and actual:
            assert "expert 2 of MoE layer 0 (0.80%)" in actual[0].message and "layer 1" not in actual[0].message


def test_with_held_out_text_the_training_text_is_not_judged() -> None:
    watch = warnings_of()
    watch.validation(validation(en=2.0))
    for loss in [2.0] * BLOCK + [2.3] * BLOCK:
        assert watch.step({"lm_loss": 2.0, "lm_loss_original": loss}) == []


def test_a_checkpoint_that_a_stop_has_no_time_for_is_warned_of_once() -> None:
    watch = warnings_of(grace_s=30)
    assert watch.saved(10, 19) == []
    (actual,) = watch.saved(10.5, 20)
    assert actual.kind == "grace_too_short" and "up to 10.5 s and a checkpoint 20 s" in actual.message
    assert watch.saved(11, 20) == []
    assert warnings_of().saved(1e6, 1e6) == []


def test_one_idle_step_does_not_make_an_expert_idle() -> None:
    watch = warnings_of()
    records = [{"lm_loss": 2.0, "token_share": [[0.96, 0.0 if step == 2 else 0.04]]} for step in range(BLOCK)]
    assert [warning for record in records for warning in watch.step(record)] == []


def test_a_rising_loss_on_held_out_original_text_is_warned_of_in_stage_1_only() -> None:
    for stage, expected in (("stage1", ["en"]), ("stage2", [])):
        watch = warnings_of(stage)
        assert watch.validation(validation(en=2.0, zh=3.0, el=4.0)) == []
        assert watch.validation(validation(en=2.19, zh=3.0, el=5.0)) == []  # 9.5%
        actual = watch.validation(validation(en=2.21, zh=3.0, el=5.0))
        assert [warning.kind for warning in actual] == ["original_loss_rises"] * len(expected)
        assert all("en +10.5%" in warning.message and "zh" not in warning.message for warning in actual)
        assert watch.validation(validation(en=2.3, zh=3.0, el=5.0)) == []
    watch = warnings_of("stage1")
    watch.validation(validation(en=2.0, zh=3.0))
    assert len(watch.validation(validation(en=2.5, zh=3.0))) == 1
    (second,) = watch.validation(validation(en=2.5, zh=4.0))  # another language's onset
    assert "zh" in second.message and "en" not in second.message


def test_a_nan_loss_is_warned_of_at_once() -> None:
    watch = warnings_of()
    actual = [[warning.kind for warning in watch.step({"lm_loss": loss})] for loss in (2.0, None, None, 2.0, None)]
    assert actual == [[], ["not_a_number"], [], [], ["not_a_number"]]


@pytest.mark.parametrize("cut", [0, 1, BLOCK, BLOCK + 3])
def test_a_resumed_run_warns_like_the_uninterrupted_one(cut: int) -> None:
    """It sees the records that the interrupted run has judged."""
    share = [[1.0, 0.999, 0.001]]
    records = [validation(en=2.0)] + [{"lm_loss": 2.0, "token_share": share} for _ in range(2 * BLOCK)]
    records += [validation(en=3.0), validation(en=3.0)]

    def messages(watch: EarlyWarnings, record: dict) -> list[str]:
        return [warning.message for warning in watch.see(record)]

    uninterrupted, resumed = warnings_of(), warnings_of()
    expected = [messages(uninterrupted, record) for record in records]
    for record in [*records[:cut], {"event": "warning", "message": "…"}]:
        resumed.see(record)
    assert [messages(resumed, record) for record in records[cut:]] == expected[cut:]
    assert sum(map(len, expected)) == 2


def test_a_node_is_slow_if_it_is_the_slowest_for_a_whole_block() -> None:
    warnings = warnings_of()
    steps = [(3, 1.3), (1, 1.3), *[(3, 1.2)] * BLOCK, (3, 1.2), (3, 1.1), *[(3, 1.4)] * BLOCK]
    actual = [[one.kind for one in warnings.timed(*step)] for step in steps]
    named = ["slow_node"]
    assert actual == [[]] * (BLOCK + 1) + [named] + [[]] * (BLOCK + 1) + [named]
