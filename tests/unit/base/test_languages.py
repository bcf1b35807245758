"""A language has one code, whatever names it: compared with codes that corpora and benchmarks use."""

import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from moelpr.base.languages import canonical, is_code, language_name


@pytest.mark.parametrize(
    "names, code, english",
    [
        ("el ell ell_Grek gre EL ell-grek", "el", "Greek"),
        ("eu eus eus_Latn", "eu", "Basque"),
        ("zh zho chi zh-Hans zho_Hans cmn_Hani cmn", "zh", "Chinese"),  # Belebele has zho_Hans, FineWeb-2 cmn_Hani
        ("zh-Hant zho_Hant cmn_Hant", "zh-Hant", "Chinese (Hant)"),
        ("sr srp srp_Cyrl", "sr", "Serbian"),
        ("srp_Latn sr-Latn", "sr-Latn", "Serbian (Latn)"),
        ("ar arb arb_Arab ara", "ar", "Arabic"),
        ("ko kor_Hang", "ko", "Korean"),
        ("az azj_Latn", "az", "Azerbaijani"),
        ("tl tgl_Latn", "tl", "Tagalog"),
        ("fil fil_Latn", "fil", "Filipino"),
        ("is isl isl_Latn", "is", "Icelandic"),
        ("gl glg_Latn", "gl", "Galician"),
        ("ckb ckb_Arab", "ckb", "Central Kurdish"),
        ("yue yue_Hani yue_Hant", "yue", "Yue Chinese"),
        ("pt-BR pt_br", "pt-BR", "Portuguese (BR)"),
    ],
)
def test_codes_of_one_language_are_one(names: str, code: str, english: str) -> None:
    for name in names.split():
        assert is_code(name)
        assert canonical(name) == code
        assert language_name(name) == english


@pytest.mark.parametrize("name", ["", "original", "expanded", "el8b", "greek", "mean original", "wiki", "el test", "e"])
def test_what_is_no_code_stays_as_it_is(name: str) -> None:
    assert not is_code(name)
    assert canonical(name) == language_name(name) == name


def test_detected_languages_have_different_canonical_codes() -> None:
    labels = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).labels
    codes = [canonical(label) for label in labels]
    assert len(set(codes)) == len(set(labels))
    assert [canonical(code) for code in codes] == codes
