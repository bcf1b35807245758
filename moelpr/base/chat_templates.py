"""The limits of a chat template, which is a program that comes with a model."""

import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from moelpr.base.errors import UserError, first_line

_MOST_CPU_S = 20.0  # to render one conversation; a template may loop for ever
_MOST_BYTES = 4 << 30  # memory of a process that renders


@contextmanager
def renders_template(refusal: type[Exception] = UserError) -> Iterator[None]:
    """Turn all that fails in a template, or takes too long, into a refusal; only in the main thread."""
    from jinja2 import TemplateError

    signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_CPU_S)
    try:
        yield
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, MemoryError, TimeoutError) as error:
        raise refusal(f"the chat template refuses the conversation ({first_line(error)})") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def rendered_apart(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, Any]) -> str:
    """The prompt of a conversation, rendered in a process of its own, as a thread cannot end a template.

    Raises:
        UserError: The template refuses the conversation, or takes too much time or memory.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_render, template, messages, special_tokens, _MOST_CPU_S).result()
        except BrokenProcessPool:
            raise UserError("the chat template takes too much time or memory; download the tokenizer again") from None


def _render(
    template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, Any], most_cpu_s: float
) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    for kind, most in ((resource.RLIMIT_CPU, int(used_s + most_cpu_s) + 1), (resource.RLIMIT_AS, _MOST_BYTES)):
        resource.setrlimit(kind, (most, most))  # also where Python handles no signals
    with renders_template():
        prompts, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **special_tokens
        )
    return str(prompts[0])


def _stop(*_: object) -> None:
    raise TimeoutError(f"it takes more than {_MOST_CPU_S} seconds")
