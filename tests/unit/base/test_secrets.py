"""Secrets are found whatever their scheme or case, and ordinary text is not taken for one."""

import pytest

from moelpr.base.secrets import without_paths, without_secrets
from moelpr.data.text.remote import pinned, shown

KEY = "abcDEF0123456789" * 3
SECRETS = [
    *(f"{prefix}{KEY}" for prefix in "hf_ api_org_ sk-proj- ghp_ github_pat_ glpat- xoxb-1234-".split()),
    *("AKIA" + "ABCD" * 4, "ASIA" + "ABCD" * 4, f"AIza{KEY[:35]}", f"pypi-{KEY}{KEY}", f"eyJ{KEY}.eyJ{KEY}.{KEY}"),
    "-----BEGIN OPENSSH PRIVATE KEY-----",
    f"aws_secret_access_key={KEY}",
    f'"WANDB_API_KEY": "{KEY}"',
    f"PASSWORD={KEY}",
    f"https://b.example/k.jsonl?X-Amz-Signature={KEY}&a=1",
    f"https://b.example/k.jsonl?a=1&sig={KEY}",
    f"s3://AKIA:{KEY}/x@bucket/k",
    f"https://{KEY}@b.example/x",
    f"hf://user:{KEY}@datasets/a",
    f"HTTP://user:{KEY}@b.example/x",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_found_and_hidden(text: str) -> None:
    hidden = without_secrets(f"before {text} after")
    assert KEY not in hidden and hidden.startswith("before ") and hidden.endswith(" after")
    assert KEY not in shown(text)


@pytest.mark.parametrize("text", SECRETS[-4:])
def test_a_uri_with_a_login_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ValueError, match="login") as raised:
        pinned(text)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "hf_ and sk-learn, ghp_short, token=abc, a keyword: password",
        '{"eos_token": "<|endoftext|>", "pad_token": null, "tokenizer_class": "PreTrainedTokenizerFast"}',
        "http://127.0.0.1:7860/config@main and s3://bucket/a@b/c.jsonl hf://datasets/a/b@main/x",
        "https://user.example/a?page=2&q=sig",
        "0123456789abcdef" * 4,
    ],
)
def test_ordinary_text_has_none(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("path", ["/lustre/p1/", "/gpfs/x/", "/scratch2/x/", r"C:\\Users\\ana\\", "/home/ana/data/"])
def test_paths_of_a_machine_are_replaced_by_names(path: str) -> None:
    assert without_paths(f"`{path}el_text.json`") == "`el_text.json`"


@pytest.mark.parametrize("text", ["and/or", "path/to/this/folder", "https://hf.co/home/x/y", "~/data/x/y", "/tmp"])
def test_other_slashes_are_no_paths(text: str) -> None:
    assert without_paths(text) == text
