"""New tokens for new languages: which ones, and the tokenizer with them as a folder."""

import json
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data_tools.preprocessing.job_tokenizer import JobTokenizer, load_job_tokenizer
from data_tools.vocabulary.bpe_tokenizer import BpeTokenizer
from data_tools.vocabulary.counting import NewText, OriginalText
from data_tools.vocabulary.merges import Candidate, NewToken, Words, continue_merges
from moelpr.base.errors import UserError
from moelpr.base.files import copy_part
from moelpr.base.model_code import drop_code
from moelpr.data.tokenizers.base import vocabulary_checksum
from moelpr.data.vocabulary_extension import VocabularyExtension

# A token must occur twice in the smallest language's text, or as often relative to its tokens in another's.
_MIN_OCCURRENCES = 2
_WEIGHT_OF_LARGEST = 1 << 8  # weights are whole numbers, so that sums do not depend on their order
# Files of a tokenizer's folder besides its vocabulary.
_COMPANIONS = (
    "tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json "
    "additional_chat_templates"
).split()
_SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model")


class OriginalTextGuard:
    """Refuses new tokens that would change how original-language text is tokenized.

    A new merge comes after all old ones. So it changes a text exactly if its two tokens are neighbors in the text as
    the old tokenizer encodes it, and no other new merge has changed that. A pair with another new token occurs only in
    texts that have changed already.

    Args:
        checked, held_out: The original text in two parts. Both are protected; what only the held-out part refuses shows
            how often text that was not given would change.
        max_changed_share: Fraction of all documents that may change.

    Attributes:
        unforeseen: Number of held-out documents, copies counted, that tokens would have changed that do not occur in
            the checked part.
    """

    def __init__(
        self, first_new_id: int, checked: OriginalText, held_out: OriginalText, max_changed_share: float
    ) -> None:
        self.unforeseen = 0
        self._first_new_id = first_new_id
        self._parts = checked, held_out
        self._may_change = int(max_changed_share * (checked.documents + held_out.documents))

    def allows(self, candidate: Candidate, text: str) -> bool:
        checked, held_out = (part.whole[text] for part in self._parts)
        if len(candidate) == 2 and 0 <= min(candidate) and max(candidate) < self._first_new_id:
            pairs = [part.pairs.documents_with(*candidate) for part in self._parts]
            checked, held_out = checked + pairs[0], held_out + pairs[1]
        if checked + held_out > self._may_change:
            self.unforeseen += held_out if not checked else 0
            return False
        self._may_change -= checked + held_out
        return True


def choose_tokens(
    bpe: BpeTokenizer, texts: dict[str, NewText], number: int, guard: OriginalTextGuard
) -> list[NewToken]:
    """Choose new tokens for the words of several languages, of which each counts the same, however much text it has.

    Raises:
        UserError: The text gives fewer tokens.
    """
    symbols = {word: bpe.symbols(word) for word in sorted({word for text in texts.values() for word in text.words})}
    sizes = [sum(count * len(symbols[word]) for word, count in text.words.items()) for text in texts.values()]
    weights = [max(sizes) * _WEIGHT_OF_LARGEST // max(size, 1) for size in sizes]
    counts: Counter[str] = Counter()
    for text, weight in zip(texts.values(), weights, strict=True):
        for word, count in text.words.items():
            counts[word] += count * weight
    words = Words((pieces, counts[word]) for word, pieces in symbols.items())
    least = _MIN_OCCURRENCES * max(weights)
    tokens = continue_merges(words, bpe.texts, bpe.characters, bpe.first_new_id, least, guard.allows)
    label = "choosing new tokens"
    with tqdm(total=number, desc=label, unit="token", leave=False, disable=None) as bar:
        if bar.disable:
            print(f"{label} from {len(counts):,} distinct words", file=sys.stderr, flush=True)
        new: list[NewToken] = []
        for token in tokens:
            new.append(token)
            bar.update()
            if len(new) == number:
                return new
    smallest = min(texts, key=lambda language: texts[language].bytes)
    raise UserError(
        f"the text of {', '.join(texts)} gives only {len(new):,} new tokens, but --num-new-tokens is {number:,}; lower "
        f"it or add text, {smallest} first, of which there are {texts[smallest].bytes / 1e6:,.1f} MB"
    )


def write_tokenizer(
    folder: Path, old_folder: Path, old: JobTokenizer, bpe: BpeTokenizer, new: list[NewToken]
) -> list[str]:
    """Write the extended tokenizer and vocabulary_extension.json into a folder, and return notes for the user."""
    for name in _COMPANIONS:
        copy_part(old_folder, name, folder / name)
    drop_code(folder)
    (folder / "tokenizer.json").write_text(bpe.extended(new), encoding="utf-8")
    VocabularyExtension(
        first_new_id=bpe.first_new_id,
        replaces=[token.replaces for token in new],
        old_fingerprint=old.record.fingerprint,
        old_vocabulary_sha256=vocabulary_checksum({text: id for id, text in bpe.texts.items()}, bpe.first_new_id),
    ).write(folder)
    slow = [name for name in _SLOW_TOKENIZERS if (old_folder / name).is_file()]
    return [f"{name} is left out: the new tokens are only in tokenizer.json" for name in slow]


def load_extended(folder: Path, expected: str) -> JobTokenizer:
    """Load the extended tokenizer as training will, and check that it is what was written."""
    loaded = load_job_tokenizer("HuggingFaceTokenizer", str(folder), False, None)
    actual, wanted = json.loads(loaded.tokenizer.source), json.loads(expected)
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer"):
        if actual.get(part) != wanted[part]:
            raise UserError(
                f"transformers changes the {part} of the extended tokenizer when it loads it; load the old "
                "tokenizer with AutoTokenizer, save it with save_pretrained, and extend that"
            )
    return loaded
