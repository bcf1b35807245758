"""The limits of a chat template, which is a program that comes with a model."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from moelpr.base.errors import UserError, first_line

_MOST_CPU_S = 20.0  # to render one conversation; a template may loop for ever


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


def _stop(*_: object) -> None:
    raise TimeoutError(f"it takes more than {_MOST_CPU_S} seconds")
