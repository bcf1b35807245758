"""One code per language, whatever its text or its user calls it, and the English names of codes for reports."""

import re
from functools import cache, lru_cache

from moelpr.base.errors import UserError

# Names that the registry gives otherwise, or second.
_NAMES = {"el": "Greek", "ky": "Kyrgyz", "ny": "Chichewa", "pa": "Punjabi"}
# Codes that CLDR replaces by those of other languages: Tagalog by Filipino, Serbo-Croatian by Serbian.
_KEPT = {"tl": "tl", "tgl": "tl", "sh": "sh", "hbs": "sh"}
# Scripts that another one contains.
_PARTS = {("Hani", "Hans"), ("Hani", "Hant"), ("Hang", "Kore")}


def is_code(name: str) -> bool:
    """Whether a name is a registered code of a language, such as "el", "ell", "ell_Grek" or "zh-Hant"."""
    from langcodes import tag_is_valid

    return tag_is_valid(name)


def check_name(name: str) -> None:
    """Check that a name is a code, or does not mean a language, as mathematics does not.

    Raises:
        UserError: It is the English name of a language, or of two letters, such as a country's.
    """
    from langcodes import Language, tag_is_valid

    if is_code(name):
        return
    meant = {english.lower(): code for code, english in _registered_names().items()}.get(name.lower())
    if len(name) == 2 and tag_is_valid(f"und-{name}"):
        meant = Language.get(f"und-{name}").maximize().language
    if meant or len(name) == 2:
        hint = f"did you mean {canonical(meant)}?" if meant else "use one such as el or ell_Grek"
        raise UserError(f"{name} is not the code of a language; {hint}")


@lru_cache(1 << 12)
def canonical(name: str) -> str:
    """The one code of a language: that of ISO 639-1 if there is one, of ISO 639-3 otherwise.

    As in BCP 47, a script is part of it only if the language is usually written in another: "ell_Grek" and "ell" are
    "el", "srp_Cyrl" is "sr", "srp_Latn" is "sr-Latn", "zho_Hans" is "zh". An individual language whose macrolanguage
    has a code of two letters gets that one: "arb" and "cmn" are "ar" and "zh". A name that is no code is returned
    unchanged.
    """
    from langcodes import Language

    if not is_code(name):
        return name
    tag = Language.get(name)
    language = _KEPT.get(re.split("[-_]", name)[0].lower()) or tag.language
    if language is None or tag.extlangs:
        return tag.to_tag()
    macrolanguage = tag.prefer_macrolanguage().language
    if len(language) > 2 and macrolanguage is not None and len(macrolanguage) == 2:
        language = macrolanguage
    script, usual = tag.script, Language.get(language).maximize().script
    if script == usual or (script, usual) in _PARTS:
        script = None
    return Language.make(language, None, script, tag.territory, tag.variants).to_tag()


def language_name(language: str) -> str:
    """The English name of a code, such as Greek for "el"; what is no code is returned unchanged."""
    base, _, rest = canonical(language).partition("-")
    name = _registered_names().get(base)
    if name is None or not is_code(language):
        return language
    return f"{name} ({rest})" if rest else name


@cache
def _registered_names() -> dict[str, str]:
    """The names of languages in IANA's registry, without years and "(macrolanguage)"."""
    from langcodes.registry_parser import parse_registry

    entries = (entry for entry in parse_registry() if entry["Type"] == "language")
    return {entry["Subtag"]: re.sub(r" \(.*\)$", "", entry["Description"][0]) for entry in entries} | _NAMES
