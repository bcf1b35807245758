"""What a job counts on its way: for the report, the manifests, and a job that goes on with it."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from data_tools.preprocessing.languages import Bits
from moelpr.data.manifest import LanguageCount

PROBLEMS_SHOWN = 10


@dataclass
class CorpusTally:
    """Counts of one corpus.

    Attributes:
        languages: by name.
        sources: documents by input file.
        num_empty: documents without a token.
    """

    languages: dict[str, LanguageCount] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)
    num_empty: int = 0

    def count(self, language: str, bits: Bits) -> LanguageCount:
        if language not in self.languages:
            self.languages[language] = LanguageCount("original" if language in bits.original else "expanded")
        return self.languages[language]

    def add(self, other: "CorpusTally") -> None:
        for name, theirs in other.languages.items():
            ours = self.languages.setdefault(name, LanguageCount(theirs.bit))
            ours.documents += theirs.documents
            ours.tokens += theirs.tokens
            ours.bytes += theirs.bytes
        self.sources.update(other.sources)
        self.num_empty += other.num_empty


@dataclass
class Tally:
    """Counts of a job.

    Attributes:
        corpora: by the corpus's name within the job.
        num_read: lines or rows, broken ones included, blank ones not.
        num_skipped: broken ones among them.
        num_undetected: documents left out because their language is uncertain.
        problems: the first few of what was wrong with those.
        audit: by stated and detected language, the documents.
    """

    corpora: dict[str, CorpusTally] = field(default_factory=dict)
    num_read: int = 0
    num_skipped: int = 0
    num_undetected: int = 0
    problems: list[str] = field(default_factory=list)
    audit: dict[str, Counter[str]] = field(default_factory=dict)

    def corpus(self, name: str) -> CorpusTally:
        return self.corpora.setdefault(name, CorpusTally())

    def add(self, other: "Tally") -> None:
        for name, corpus in other.corpora.items():
            self.corpus(name).add(corpus)
        self.num_read += other.num_read
        self.num_skipped += other.num_skipped
        self.num_undetected += other.num_undetected
        self.problems += other.problems[: PROBLEMS_SHOWN - len(self.problems)]
        for stated, detected in other.audit.items():
            self.audit.setdefault(stated, Counter()).update(detected)

    def as_json(self) -> dict[str, Any]:
        return {
            "corpora": {
                name: {
                    "languages": {language: asdict(count) for language, count in corpus.languages.items()},
                    "sources": dict(corpus.sources),
                    "num_empty": corpus.num_empty,
                }
                for name, corpus in self.corpora.items()
            },
            "num_read": self.num_read,
            "num_skipped": self.num_skipped,
            "num_undetected": self.num_undetected,
            "problems": self.problems,
            "audit": {stated: dict(detected) for stated, detected in self.audit.items()},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        tally = cls(**content)
        tally.corpora = {
            name: CorpusTally(
                {language: LanguageCount(**count) for language, count in corpus["languages"].items()},
                Counter(corpus["sources"]),
                corpus["num_empty"],
            )
            for name, corpus in content["corpora"].items()
        }
        tally.audit = {stated: Counter(detected) for stated, detected in content["audit"].items()}
        return tally
