"""English names of language codes, for reports."""

_NAMES = """
af Afrikaans, am Amharic, ar Arabic, az Azerbaijani, bg Bulgarian, bn Bengali, ca Catalan, cs Czech, da Danish, de
German, el Greek, en English, es Spanish, et Estonian, fa Persian, fi Finnish, fr French, gu Gujarati, ha Hausa, he
Hebrew, hi Hindi, hr Croatian, hu Hungarian, hy Armenian, id Indonesian, ig Igbo, it Italian, ja Japanese, ka
Georgian, kk Kazakh, km Khmer, kn Kannada, ko Korean, ky Kyrgyz, lo Lao, lt Lithuanian, lv Latvian, mg Malagasy, ml
Malayalam, mr Marathi, ms Malay, my Burmese, ne Nepali, nl Dutch, no Norwegian, ny Chichewa, pa Punjabi, pl Polish, pt
Portuguese, ro Romanian, ru Russian, si Sinhala, sk Slovak, sl Slovenian, sn Shona, so Somali, sr Serbian, sv Swedish,
sw Swahili, ta Tamil, te Telugu, th Thai, tl Tagalog, tr Turkish, uk Ukrainian, ur Urdu, uz Uzbek, vi Vietnamese, xh
Xhosa, yo Yoruba, zh Chinese, zu Zulu
"""
LANGUAGE_NAMES = dict(name.split(maxsplit=1) for name in _NAMES.strip().split(","))


def language_name(language: str) -> str:
    """The English name of a code, such as Greek for "el"; an unlisted code is returned unchanged."""
    return LANGUAGE_NAMES.get(language, language)


def canonical(code: str) -> str:
    """TEMPORARY"""
    return code
