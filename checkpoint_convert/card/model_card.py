"""The model card of an export (README.md), from the records of the conversion and of the runs that trained it."""

from dataclasses import asdict, dataclass
from typing import Any

from jinja2 import Environment, PackageLoader

from checkpoint_convert.card.front_matter import front_matter, inherited, plain
from checkpoint_convert.card.readers import obstacle, readers_sentence
from checkpoint_convert.common.megatron_folder import MegatronReader, num_elements
from checkpoint_convert.hf.model_files import BASE_CARD_FILE, CARD_FILE
from moelpr.base import records
from moelpr.base.run_folder import HF_FOLDER
from moelpr.base.versions import installed_versions
from moelpr.data.vocabulary_extension import VocabularyExtension
from moelpr.model.checkpoints.lineage import Lineage
from moelpr.model.families.hub import is_hub_name
from moelpr.model.metrics import schema
from moelpr.model.stages import Part

# Keys in the front matter of the base's card that also apply to the export.
LICENSE_KEYS = ("license", "license_name", "license_link")
INHERITED = ("language", *LICENSE_KEYS)
TEMPLATES = Environment(
    loader=PackageLoader("checkpoint_convert.card"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)
TEMPLATES.globals["metrics"] = schema


@dataclass(frozen=True)
class CardFacts:
    """The facts that an export's card tells; unknown details are omitted."""

    source: MegatronReader
    config: dict[str, Any]  # config.json of the export
    dtype: str
    base_model: str | None  # name of the base, on the Hub (owner/name) or of its folder
    lineage: Lineage

    @property
    def architecture(self) -> str:
        """Class of the export."""
        return self.config["architectures"][0]

    @property
    def readers(self) -> str:
        """A sentence that says which readers run the export, and how to export it for the others."""
        return readers_sentence(self.source.family, self.source.spec, self.config)


def model_card(facts: CardFacts) -> str:
    """README.md of an export: front matter for the Hugging Face Hub, then Markdown."""
    base, spec = facts.source.folder / HF_FOLDER, facts.source.spec
    num_parameters = num_active = num_elements(facts.source.pieces)
    if spec.moe is not None:
        new = num_elements([piece for piece in facts.source.pieces if piece.part is Part.NEW_EXPERTS])
        one_expert = new // spec.moe.num_new_experts
        num_parameters += one_expert * (spec.moe.original_copies - 1)
        num_active = num_parameters - one_expert * (spec.moe.num_experts - spec.moe.topk)
    lineage = records.validate(Lineage, plain(asdict(facts.lineage)), Lineage.FILE_NAME, Lineage.REMEDY)
    return TEMPLATES.get_template("model_card.md").render(
        vars(facts) | {"lineage": lineage, "base_model": plain(facts.base_model)},
        architecture=facts.architecture,
        readers=facts.readers,
        is_read_by_vllm=obstacle("vllm", facts.config) is None,
        spec=spec,
        front_matter=front_matter(
            **inherited(base, INHERITED),
            library_name="transformers",
            pipeline_tag="text-generation",
            base_model=facts.base_model if facts.base_model and is_hub_name(facts.base_model) else None,
            tags=["moe", "moe-lpr"] if spec.moe else ["moe-lpr"],
        ),
        base_card=BASE_CARD_FILE if (base / CARD_FILE).is_file() else None,
        num_parameters=num_parameters,
        num_active=num_active,
        installed=installed_versions(),
        new_tokens=_new_tokens(facts.source),
    )


def joint_license(*cards: dict[str, Any]) -> dict[str, Any]:
    """The keys of the license that all cards have, or one that names each; {} if a card has none."""
    if not cards or not all("license" in card for card in cards):
        return {}
    licenses = [{key: card[key] for key in LICENSE_KEYS if key in card} for card in cards]
    if all(license == licenses[0] for license in licenses):
        return licenses[0]
    names = dict.fromkeys(str(license.get("license_name", license["license"])) for license in licenses)
    return {"license": "other", "license_name": "-and-".join(names)}


def _new_tokens(source: MegatronReader) -> str:
    """How the vocabulary was extended; "" if it was not."""
    if (tokens := source.spec.new_tokens) is None:
        return ""
    replaces = VocabularyExtension.read(source.folder / HF_FOLDER).replaces
    return (
        f"extended by {tokens.number:,} tokens (IDs {tokens.first:,} to {tokens.end - 1:,}), each in place of "
        f"{sum(map(len, replaces)) / len(replaces):.1f} of the base's on average; their rows in embedding and output "
        "layer started as the mean of those"
    )
