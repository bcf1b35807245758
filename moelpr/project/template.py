"""A commented languages.yaml to start from."""

from collections.abc import Sequence
from textwrap import indent

from moelpr.base.yaml_files import dump

_TEXT = """\
# From text to a Hugging Face model that speaks more languages:
#   moelpr plan languages.yaml     what it takes, before anything starts
#   moelpr run languages.yaml      do it; run it again to resume, and after an edit
#   moelpr status languages.yaml   what is done, and when the rest will be
# Editors check and complete this file with the schema that `moelpr init --schema` prints.

# The dense base, not its chat model: a Hugging Face directory, or OWNER/NAME[@REVISION] on the Hub.
model: {model}
output: {output}

# Text: files, folders or patterns of JSON lines ({{"text": …}}, also .gz, .zst, .bz2) or Parquet.
languages:
  expanded:  # to add
{expanded}
  # To keep: a little text of every language that the model must not lose, of code and mathematics too.
  original:
{original}
  # Other languages and code, which stay with the original expert; nothing trains on them. auto fetches a little text in
  # a hundred languages with npm; or files of your own, one for each language or kind, such as other/*.jsonl
  kept: auto
# A language may have settings:  el: {{text: el.jsonl, weight: 2, max_epochs: 4, held_out: el-test.jsonl}}

# auto: one new FFN per layer, which trains as a dense model's; a token uses it or the base's, so it costs no more.
# Routers are found without training; if they are not good enough, a review trains others.
# Or review (both stages of MoE-LPR), second-ffn, paper; to compare with, full, ffn and lora.
method: auto

# The budget of the training: tokens, hours (on GPUs whose speed is predicted) or epochs.
budget: {{epochs: 1}}
# How the new languages share it: by their size to this power (0: equally), or by a weight for each.
# mix: {{temperature: 0.3}}
# A review trains only routers, on so many documents of each language.
# replay: {{original_documents: 50000, expanded_documents: 100000, epochs: 1}}

# auto: this machine; or for example {{gpu: h100-80, gpus: 32, gpus_per_node: 8}}
hardware: auto

# With method: second-ffn:
# experts: per-language                     # an FFN for each new language, which trains on its text alone
# With method: review:
# experts: {{new: auto, topk: 2}}            # per layer (auto: the most that fit, up to 8); how many a token chooses
# vocabulary: {{new_tokens: 8000}}           # if the tokenizer splits the new languages into small pieces
# languages with conversations, for a chat stage:  en: {{text: …, conversations: en-chat.jsonl}}

# chat: {chat}   # its difference from the base makes the result chat
# benchmarks: {{limit: 200}}
# trackers: {{wandb_project: moelpr}}         # or mlflow_experiment, or both
# slurm: {{options: {{partition: gpu, time: "24:00:00"}}}}   # of moelpr run --on slurm

# Any flag of a step, as its command takes it (moelpr train stage1 --help):
# steps:
#   preprocess: {{workers: 16}}
#   ffn: {{lr: 5.0e-5, save-interval: 500}}
"""


def template(
    model: str, expanded: Sequence[tuple[str, str]] | None = None, original: Sequence[tuple[str, str]] | None = None
) -> str:
    """The file for a model and languages: pairs of code and text."""

    def lines(pairs: Sequence[tuple[str, str]]) -> str:
        return indent(dump(dict(pairs)).rstrip("\n"), "    ")

    chat = model.removesuffix("-Base") if model.endswith("-Base") else f"{model}-Instruct"
    values = {"model": model, "chat": chat, "output": f"runs/{model.rstrip('/').rpartition('/')[2]}-languages"}
    return _TEXT.format(
        **{key: dump(value).splitlines()[0] for key, value in values.items()},
        expanded=lines(expanded or [("el", "text/el.jsonl")]),
        original=lines(original or [("en", "text/en.jsonl")]),
    )
