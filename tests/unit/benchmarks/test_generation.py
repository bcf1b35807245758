from argparse import Namespace

from benchmarks import generation
from benchmarks.timing import Turns


def test_a_prompt_is_read_and_tokens_are_written_by_the_base_and_every_choice() -> None:
    sizes = Namespace(layers=1, hidden=72, ffn=16, prompt=8, written=3)
    cases = dict(generation.run(Turns(1), sizes))
    assert [*cases] == ["reading 8 tokens", "writing 3 tokens"]
    for times in cases.values():
        assert len(times) == 1 + 2 * len(generation.NEW_EXPERTS)
        assert all(seconds > 0 for its in times.values() for seconds in its)
