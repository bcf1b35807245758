"""The text that a chat template writes around messages, by rendering probes, and the same as Ollama's template."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SYSTEM, FIRST, ANSWER, SECOND = "SYSTEMPROBE", "FIRSTPROBE", "ANSWERPROBE", "SECONDPROBE"
Messages = list[dict[str, str]]
Render = Callable[[Messages, bool], str]  # messages, whether the model is to answer → the prompt


class Inexpressible(ValueError):
    """The chat template does more than write text around each message."""


@dataclass(frozen=True)
class ChatFormat:
    """The text before and after a message of each role."""

    head: str  # text that starts a conversation without a system message, such as a default one
    system: tuple[str, str] | None  # none if the template refuses system messages
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str  # text that follows the last message, for the model to continue
    # its own turn, or inside the first or the last turn of the user, before `system[1]`
    system_place: Literal["own", "first", "last"] = "own"

    @classmethod
    def of(cls, render: Render) -> "ChatFormat":
        """The format of a template.

        Raises:
            Inexpressible: It has none, as its prompts for several conversations show.
        """
        start, after = _around(render([_user(FIRST)], False), FIRST)
        _, user_to_assistant, assistant_to_user, _ = _around(render(_dialogue(), False), FIRST, ANSWER, SECOND)
        *_, after_answer = _around(render(_dialogue()[:2], False), FIRST, ANSWER)
        before_user = _without(assistant_to_user, after_answer, "")
        before_assistant = _without(user_to_assistant, after, "")
        answer = _without(_around(render([_user(FIRST)], True), FIRST)[1], after, "")
        own = _without(start, "", before_user), None, (before_user, after), (before_assistant, after_answer), answer
        complete = _with_system(cls(*own), render)
        for messages in _conversations(complete.system is not None):
            if complete.render(messages) != render(messages, True):
                raise Inexpressible(f"it renders a conversation of {len(messages)} messages in another way")
        return complete

    def render(self, messages: Messages) -> str:
        """The prompt that ends with `answer`; the first message may be a system message, the last is the user's."""
        has_system = messages[0]["role"] == "system"
        system = messages[0]["content"] if has_system else ""
        text = "" if has_system else self.head
        for number, message in enumerate(messages):
            (before, behind), content = getattr(self, message["role"]), message["content"]
            if message["role"] == "system" and self.system_place != "own":
                continue
            is_place = number == (1 if self.system_place == "first" else len(messages) - 1)
            if has_system and self.system_place != "own" and message["role"] == "user" and is_place:
                assert self.system is not None
                content = system + self.system[1] + content
            text += before + content + behind
        return text + self.answer

    def go_template(self) -> str:
        """The format as Ollama's TEMPLATE; an answer that is to be continued has no end."""
        texts = [self.head, *(self.system or ()), *self.user, *self.assistant, self.answer]
        if any(mark in text for text in texts for mark in ("{{", "}}", '"""')):
            raise Inexpressible("it writes braces or quotes that mean something else to Ollama")
        place = {"first": "(eq $i 1)", "last": "$last"}.get(self.system_place)
        inside = f"{{{{ if and {place} $.System }}}}{{{{ $.System }}}}{(self.system or ('', ''))[1]}{{{{ end }}}}"
        roles = {
            "user": f"{self.user[0]}{inside if place else ''}{{{{ .Content }}}}{self.user[1]}"
            f"{{{{ if $last }}}}{self.answer}{{{{ end }}}}",
            "assistant": f"{self.assistant[0]}{{{{ .Content }}}}{{{{ if not $last }}}}{self.assistant[1]}{{{{ end }}}}",
        }
        if self.system is not None and place is None:
            roles["system"] = f"{self.system[0]}{{{{ .Content }}}}{self.system[1]}"
        branches = "{{ else ".join(f'if eq .Role "{role}" }}}}{text}' for role, text in roles.items())
        head = f"{{{{ if not .System }}}}{self.head}{{{{ end }}}}" if self.head else ""
        last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        return f"{head}{{{{ range $i, $_ := .Messages }}}}{last}{{{{ {branches}{{{{ end }}}}{{{{ end }}}}"


def _with_system(plain: ChatFormat, render: Render) -> ChatFormat:
    """The same format with what the template does with a system message; without, if it refuses one."""
    system = {"role": "system", "content": SYSTEM}
    try:
        before, between, _ = _around(render([system, _user(FIRST)], False), SYSTEM, FIRST)
    except Inexpressible:
        raise
    except Exception:  # raise_exception, by which templates refuse a role
        return plain
    place: Literal["own", "first", "last"] = "own"
    if before == plain.user[0] and not between.endswith(plain.user[0]):
        text = render([system, *_dialogue()], False)
        place = "first" if text.index(SYSTEM) < text.index(FIRST) else "last"
        pair = before, between
    else:
        pair = before, _without(between, "", plain.user[0])
    return ChatFormat(plain.head, pair, plain.user, plain.assistant, plain.answer, place)


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _dialogue() -> Messages:
    return [_user(FIRST), {"role": "assistant", "content": ANSWER}, _user(SECOND)]


def _conversations(has_system: bool) -> list[Messages]:
    """Conversations that the user ends, to compare."""
    dialogue = [*_dialogue(), {"role": "assistant", "content": "Ναι.\nNo"}, _user("two\n\nlines")]
    starts = [dialogue[:length] for length in (1, 3, 5)]
    return [*starts, *([{"role": "system", "content": "Be brief."}, *messages] for messages in starts if has_system)]


def _around(text: str, *probes: str) -> list[str]:
    """The parts of a rendered text between the probes."""
    parts = []
    for probe in probes:
        part, separator, text = text.partition(probe)
        if not separator:
            raise Inexpressible("it omits or changes a message")
        parts.append(part)
    return [*parts, text]


def _without(text: str, start: str, end: str) -> str:
    """A text without its start and its end."""
    if not (text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end)):
        raise Inexpressible("what it writes around a message depends on the others")
    return text[len(start) : len(text) - len(end)]
