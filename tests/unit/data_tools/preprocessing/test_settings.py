"""Options that exclude or require each other stop the job with the name of the option."""

import pytest

from data_tools.preprocessing.settings import Settings
from moelpr.base import settings
from moelpr.base.errors import UserError

REQUIRED = "--output-prefix out --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"


def parse(flags: str) -> Settings:
    return settings.parse(Settings, [*flags.split(), *REQUIRED.split()])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--language original", "--input --dataset"),
        ("--input a --dataset b --language original", "--dataset.* --input"),
        ("--input a", "--language, --language-key, --spans-key, --detect-language"),
        ("--input a --language original --language-key lang --original-languages en", "--language-key.* --language"),
        ("--dataset a", "--dataset requires --dataset-info"),
        ("--dataset-info a --input b --language original", "require --dataset"),
        ("--dataset a --dataset-dir b --json-keys text", "--json-keys requires --input"),
        ("--dataset a --dataset-dir b --language original", "excludes --language"),
        ("--input - --language original --max-samples 3", "--input - .*--max-samples"),
        ("--input - - --language original", "--input - .*only once"),
        ("--input a --language original --max-samples 0", "--max-samples must be at least 1, got 0"),
        ("--input a --language original --max-samples 1 --num-shards 2", "--max-samples and --num-shards"),
        ("--input a --language original --num-shards 3", "--num-shards 3 requires --shard, 0 to 2"),
        ("--input a --language original --num-shards 3 --shard 3", "--shard must be 0 to 2 .*got 3"),
        ("--input a --language original --shard 1", "--shard must be 0 to 0 .*got 1"),
        ("--input a --language original --workers 0", "--workers must be at least 1, got 0"),
        ("--input a --language original --workers 999999", "--workers must be at most .*, got 999999"),
        ("--input a --language original --seed -1", "--seed must be at least 0 .*got -1"),
        ("--input a --language original --validation-share 1", "--validation-share must be .*below 1"),
        ("--input a --language original --json-keys text text", "--json-keys text text"),
        ("--input a --language original --original-languages en", "--language excludes --original-languages"),
        ("--input a --language original --expanded-languages el", "--language excludes .*--expanded-languages"),
        ("--input a --language original --undetected expanded", "--undetected requires --detect-language"),
        ("--input a --language original --min-confidence 0.5", "--min-confidence requires --detect-language"),
        ("--input a --language original --max-bad-share 0", "--max-bad-share requires --on-error skip"),
        ("--input a --language eu", "--language eu requires .* such as --expanded-languages eu"),
        ("--input a --language-key lang", "--language-key requires --original-languages"),
        ("--input a --detect-language", "--detect-language requires --original-languages"),
        ("--input a --detect-language --original-languages en --audit", "--audit and --detect-language"),
        ("--input a --language eu --expanded-languages eu --audit --min-confidence 2", "--min-confidence .*got 2"),
        ("--input a --language eu --expanded-languages eu --conversations --append-eod", "excludes --append-eod"),
        ("--input a --language original --chat-template-from x", "--chat-template-from and --max-tokens require"),
        ("--input a --language original --max-tokens 5", "--chat-template-from and --max-tokens require"),
        ("--input a --spans-key spans", "--spans-key requires --original-languages"),
        ("--input a --spans-key s --original-languages en --json-keys a", "--spans-key and --json-keys"),
    ],
)
def test_contradicting_options_are_reported(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(flags)


def test_a_language_may_have_any_name_that_is_listed() -> None:
    for group in ("original", "expanded"):
        assert parse(f"--input a --language code --{group}-languages en,code").language == "code"
    with pytest.raises(UserError, match="got code"):
        parse("--input a --language code --original-languages en")


def test_a_closed_standard_input_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)  # Python's value for a closed descriptor
    with pytest.raises(UserError, match="--input - requires standard input, which is closed"):
        parse("--input - --language original")
