from moelpr.languages import language_name


def test_codes_have_english_names() -> None:
    assert language_name("el") == "Greek"


def test_an_unlisted_code_is_its_own_name() -> None:
    assert language_name("xx") == "xx"
