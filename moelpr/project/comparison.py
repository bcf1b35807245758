"""Results of `moelpr compare`: a table, a picture and all numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from moelpr.measure.evaluate.confidence import Estimate, estimates, interval_of, mean
from moelpr.measure.evaluate.results import Results
from moelpr.measure.evaluate.scoring import LanguageScore, Settings
from moelpr.measure.report import page
from moelpr.measure.report.numbers import percent
from moelpr.measure.report.plots import learned_lost_chart
from moelpr.project.resolved import ResolvedProject

# Group of texts → the mean over it.
GROUPS = {"expanded": "learned: expanded languages", "kept": "lost: text to keep", "other": "other text"}


class Compared(Results):
    """Changes of projects against their base, per text and as means over groups of texts."""

    name, title = "compare", "Learned and lost"

    def __init__(
        self,
        projects: Mapping[str, ResolvedProject],
        groups: Mapping[str, Sequence[str]],
        settings: Settings,
        of_base: Mapping[str, LanguageScore],
        scores: Mapping[str, Mapping[str, LanguageScore]],
    ) -> None:
        """Compute all intervals.

        Args:
            groups: Group → its texts.
            of_base: Text → score of the base.
            scores: Project → text → score.
        """
        self._projects, self._groups, self._settings = projects, groups, settings
        self._first = next(iter(projects))
        by_label: dict[str, dict[str, dict[str, Estimate]]] = {label: {} for label in projects}
        for text in (text for texts in groups.values() for text in texts):
            of_text = [of_base[text], *(scores[label][text] for label in projects)]
            base, *others = estimates(dict(zip(["", *projects], of_text, strict=True)), seed=1).values()
            for of, metrics in zip(by_label.values(), others, strict=True):
                of[text] = {"change": metrics["bits_per_byte"] / base["bits_per_byte"] - 1}
                of[text] |= {name: metrics[name] for name in ("distance",) if name in metrics}
        for group, texts in groups.items():
            for of in by_label.values():
                of[GROUPS[group]] = {name: mean([of[text][name] for text in texts]) for name in of[texts[0]]}
                first = by_label[self._first][GROUPS[group]]["change"]
                of[GROUPS[group]]["against_first"] = of[GROUPS[group]]["change"] - first
        # project → text, or mean → change of bits per byte, distance from the base and, of a mean, against_first
        self.estimates = {
            label: {row: {name: interval_of(one) for name, one in numbers.items()} for row, numbers in of.items()}
            for label, of in by_label.items()
        }

    @property
    def _means(self) -> list[str]:
        return [GROUPS[group] for group in self._groups]

    def findings(self) -> list[str]:
        return [
            f"{label} against {self._first}, {row}: {change.text(percent)}{'' if change.is_clear else ' unclear'}."
            for label, of in self.estimates.items()
            if label != self._first
            for row in self._means
            for change in [of[row]["against_first"]]
        ]

    def tables(self) -> dict[str, page.Table]:
        rows = [
            [label, *(of[row]["change"].text(percent) for row in self._means)]
            + [of[row]["distance"].text("{:.4f}".format) if "distance" in of[row] else "\u2013" for row in self._means]
            for label, of in self.estimates.items()
        ]
        distances = [f"KL, {row.rpartition(': ')[2]}" for row in self._means]
        note = (
            "Mean change of bits per byte (lower is better), and KL(base\u2016model) in nats per token; in brackets: "
            "95% confidence intervals, bootstrap over documents, paired."
        )
        return {"Against the base": page.Table(["project", *self._means, *distances], rows, note)}

    def figures(self) -> list[page.Figure]:
        learned, *others = self._means
        panels = {
            row: {label: (of[learned]["change"], of[row]["change"]) for label, of in self.estimates.items()}
            for row in others
        }
        title = "Learned and lost: change of bits per byte against the base"
        caption = "Change of bits per byte against the base, with 95% confidence intervals."
        return [page.Figure([learned_lost_chart(title, panels, x_axis=learned)], caption, name=self.name)]

    def numbers(self) -> dict[str, Any]:
        return {
            "settings": self._settings,
            "base": self._projects[self._first].base,
            "groups": self._groups,
            "projects": {
                label: {
                    "file": project.file.path,
                    "directory": project.export,
                    "means": {group: self.estimates[label][GROUPS[group]] for group in self._groups},
                    "texts": {text: self.estimates[label][text] for texts in self._groups.values() for text in texts},
                }
                for label, project in self._projects.items()
            },
        }
