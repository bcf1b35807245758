"""The routes of tokens as HTML: under each token a cell per layer, from blue (original) to orange (new)."""

from collections.abc import Sequence
from html import escape
from statistics import fmean

from moelpr.measure.chat.routes import Token, original_share

_NEW, _EVEN, _ORIGINAL = (226, 98, 27), (226, 226, 222), (31, 111, 191)


def colour(share: float) -> str:
    """The colour of a gate weight of the original experts: 0 is orange, one half is grey, 1 is blue."""
    ends = (_NEW, _EVEN) if share < 0.5 else (_EVEN, _ORIGINAL)
    part = 2 * share - (share >= 0.5)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(*ends, strict=True))


def _column(token: Token, num_original: int) -> str:
    shares = original_share(token.route, num_original)
    height = 100 / len(shares)
    stops = (f"{colour(share)} 0 {(number + 1) * height:.2f}%" for number, share in enumerate(shares))
    route = ";".join(",".join(f"{expert}:{weight:.3f}" for expert, weight in layer) for layer in token.route)
    label = f"{token.text.strip() or 'space'}: {fmean(shares):.0%} original"
    text = escape(token.text.replace("\n", "⏎").replace("\t", "⇥")) or "…"
    return (
        f'<span class="token" tabindex="0" data-route="{route}" aria-label="{escape(label)}"><span class="text">{text}'
        f'</span><span class="column" style="background:linear-gradient({",".join(stops)})"></span></span>'
    )


def summary(tokens: Sequence[Token], num_original: int) -> str:
    """How much of the gate weight of all layers went to original experts."""
    shares = [share for token in tokens for share in original_share(token.route, num_original)]
    if not shares:
        return ""
    share = fmean(shares)
    return (
        f'<span class="share"><span class="bar"><span style="width:{share:.1%}"></span></span>'
        f"{share:.0%} original, {1 - share:.0%} new</span>"
    )


def panel(title: str, name: str, text: str, is_placeholder: bool = False) -> str:
    """A model's answer, as plain text."""
    kind = "answer placeholder" if is_placeholder else "answer"
    return (
        f'<div class="panel"><div class="title">{escape(title)}<span>{escape(name)}</span></div>'
        f'<div class="{kind}">{escape(text)}</div></div>'
    )


def routes_panel(title: str, tokens: Sequence[Token], num_original: int, layers: Sequence[int]) -> str:
    """The tokens of a prompt or an answer, each with its column; the page's script shows the numbers of one."""
    if not tokens:
        return ""
    head = f'<div class="title">{escape(title)}{summary(tokens, num_original)}</div>'
    attributes = f'data-original="{num_original}" data-layers="{",".join(map(str, layers))}"'
    columns = "".join(_column(token, num_original) for token in tokens)
    return f'<div class="panel">{head}<div class="tokens" {attributes}>{columns}</div></div>'
