"""From a job's flags to its measurements: what evaluation on text and the routing maps have in common.

Both read the same parts: whichever comes second in an output folder has nothing left to measure.
"""

from dataclasses import dataclass

from moelpr.documents import read_documents
from moelpr.evaluate.arguments import TextJob
from moelpr.evaluate.compare import ModelResult, compare_models
from moelpr.evaluate.models import choose_device, read_max_positions
from moelpr.evaluate.parts import Parts
from moelpr.evaluate.perplexity import LanguageScore, Settings


@dataclass(frozen=True)
class Measured:
    """What the models (name -> result) did, in windows of these settings."""

    settings: Settings
    results: dict[str, ModelResult]

    def scores(self, language: str) -> dict[str, LanguageScore]:
        return {model: result.scores[language] for model, result in self.results.items()}


def measure(job: TextJob) -> Measured:
    """Everything that can be wrong with the arguments is found before the first model is opened."""
    arguments = job.arguments
    choose_device(arguments.device)
    parts = Parts(arguments.output) if arguments.output else None
    settings = Settings(arguments.sequence_length, arguments.context, arguments.batch_size)
    settings = settings.resolve({name: read_max_positions(path) for name, path in job.models.items()})
    documents = {
        language: read_documents(path, arguments.json_key, arguments.max_documents)
        for language, path in job.files.items()
    }
    results = compare_models(
        job.models, documents, settings, device=arguments.device, dtype=arguments.dtype, parts=parts
    )
    return Measured(settings, results)
