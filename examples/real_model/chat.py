"""Train the real model on conversations, and compare its replies with the base's, which is tuned for chat.

    python -m examples.real_model.chat --run runs/real-model

Greek conversations are made here; English ones are prompts with the base's own answers. After the stage `sft` with the
LPR loss, without it, and with a review of the routers (stage 2) on the same conversations, it prints KL(base ‖ model)
on the base's replies to 40 other English prompts, how many of those it keeps, the share of Greek letters in replies
to Greek prompts, and how many of these end.
"""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from examples.demo_corpus import write_lines
from examples.real_model.arguments import parser_of
from examples.real_model.base import write_base
from moelpr.base.command import run_command
from moelpr.base.errors import UserError

ROOT = Path(__file__).parents[2]
ASKS = ("What is {}?", "Name one use of {}.", "Describe {} in one short sentence.")
TOPICS = "water iron bread music paper glass sunlight rivers bridges clocks salt wood tea schools maps rain".split()
TOPICS += "milk gold trees books shoes apples ships wool sand windows cotton birds".split()
WORDS = ("νερό", "σίδερο", "ψωμί", "μουσική", "χαρτί", "γυαλί", "αλάτι", "ξύλο", "τσάι", "χάρτης", "βροχή", "ήλιος")
CAPITALS = {"Γαλλίας": "το Παρίσι", "Ιταλίας": "η Ρώμη", "Ισπανίας": "η Μαδρίτη", "Γερμανίας": "το Βερολίνο"}
CAPITALS |= {"Κύπρου": "η Λευκωσία", "Αυστρίας": "η Βιέννη", "Πολωνίας": "η Βαρσοβία", "Τουρκίας": "η Άγκυρα"}
HELD_OUT_GREEK = ("Ποια είναι η πρωτεύουσα της Ελλάδας;", "Πόσο κάνει 12 και 5;", "Τι είναι το σπίτι;", "Γεια σου!")
NUM_PROMPTS, REPLY_TOKENS = 40, 24
TRAIN = "--seq-length 192 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine"
TRAIN += " --train-iters {steps} --log-interval 1 --save-interval {steps} --no-save-optim"

REVIEW = "--lpr-loss-coeff 1 --lr 5e-3 --min-lr 5e-4 --transformer-impl local --dataloader-inter-document-masking"
# Name, stage, what it starts from, and flags; such short runs need a larger weight than 0.1.
RUNS = (
    ("sft", "sft", "start", "--lpr-loss-coeff", "1"),
    ("sft-without-lpr", "sft", "start", "--lpr-loss-coeff", "0"),
    ("review", "stage2", "sft", *REVIEW.split(), "--calculate-per-token-loss"),
)


def greek() -> list[tuple[str, str]]:
    """Questions and answers."""
    found = [(f"Πόσο κάνει {a} και {b};", f"{a} και {b} κάνουν {a + b}.") for a, b in product(range(2, 9), range(3, 9))]
    found += [
        (f"Ποια είναι η πρωτεύουσα της {of};", f"Η πρωτεύουσα της {of} είναι {is_}.") for of, is_ in CAPITALS.items()
    ]
    found += [(f"Γράψε μια πρόταση για τη λέξη «{word}».", f"Η λέξη «{word}» είναι ελληνική.") for word in WORDS]
    return found


def prompts() -> list[str]:
    """English prompts; the first `NUM_PROMPTS` are held out."""
    return [ask.format(topic) for ask, topic in product(ASKS, TOPICS)]


class Chat:
    """A model that answers, and the tokens of its prompts."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self._replies: dict[str, list[int]] = {}

    def ids(self, prompt: str) -> list[int]:
        message = [{"role": "user", "content": prompt}]
        return list(self.tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])

    def reply(self, prompt: str) -> list[int]:
        """The most likely reply, up to its end or `REPLY_TOKENS`."""
        import torch

        if prompt in self._replies:
            return self._replies[prompt]
        ids = torch.tensor([self.ids(prompt)])
        options: dict[str, Any] = {"max_new_tokens": REPLY_TOKENS, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            found = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return self._replies.setdefault(prompt, found[0, ids.shape[1] :].tolist())

    def log_probabilities(self, prompt: str, reply: list[int]) -> Any:
        """The log-probabilities at each token of a reply: [tokens, vocabulary]."""
        import torch

        ids = self.ids(prompt)
        with torch.no_grad():
            logits = self.model(torch.tensor([ids + reply])).logits[0, len(ids) - 1 : -1]
        return logits.log_softmax(-1)

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def run(*words: object) -> None:
    command = [sys.executable, "-m", "moelpr", *map(str, words)]
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"}).returncode:
        raise UserError(f"{' '.join(command[2:])} failed (see above)")


def write_corpus(folder: Path, base: Path, chat: Chat) -> None:
    """Write the conversations, and preprocess them."""
    answered = [(prompt, chat.text(chat.reply(prompt))) for prompt in prompts()[NUM_PROMPTS:][::2]]
    for language, pairs in (("el", greek()), ("en", answered)):
        turns = [[("user", question), ("assistant", answer)] for question, answer in pairs if answer]
        lines = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
        write_lines(folder / f"{language}.jsonl", lines)
        words = ["--language", language, "--original-languages", "en", "--max-tokens", 192, "--on-error", "skip"]
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", base, "--overwrite"]
        run(
            "preprocess",
            "--input",
            folder / f"{language}.jsonl",
            "--conversations",
            *words,
            "--output-prefix",
            folder / language,
        )


def exported(checkpoint: Path, save: Path) -> Chat:
    run("export", "--load", checkpoint, "--save", save, "--overwrite")
    return Chat(save)


def measure(base: Chat, model: Chat) -> dict[str, float | list[str]]:
    """Compare replies."""
    divergence, same, ended = [], 0, 0
    for prompt in prompts()[:NUM_PROMPTS]:
        reply = base.reply(prompt)
        old, new = (one.log_probabilities(prompt, reply) for one in (base, model))
        divergence.append(float((old.exp() * (old - new)).sum(-1).mean()))
        same += model.reply(prompt) == reply
    greek_replies = [model.reply(prompt) for prompt in HELD_OUT_GREEK]
    ended = sum(reply[-1] == model.tokenizer.eos_token_id for reply in greek_replies)
    texts = [model.text(reply) for reply in greek_replies]
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return {
        "KL on the base's replies": sum(divergence) / len(divergence),
        "replies that are the base's": same / len(divergence),
        "Greek letters in replies to Greek": sum("\u0370" <= x <= "\u03ff" for x in letters) / max(len(letters), 1),
        "replies to Greek that end": ended / len(texts),
        "replies": texts,
    }


def main() -> None:
    parser = parser_of(__doc__, downloads=True, overwrite=False)
    add, start = parser.add_argument, "checkpoint to start from, such as one after stage 2 (default: random routers)"
    add("--start", type=Path, metavar="DIR", help=start)
    add("--steps", type=int, default=60, metavar="N", help="steps of each stage (default: %(default)s)")
    args = parser.parse_args()
    base, folder = args.run / "base-hf", args.run / "chat"
    write_base(base, args.cache or args.run / "downloads")
    folder.mkdir(parents=True, exist_ok=True)
    chat, results = Chat(base), {}
    write_corpus(folder, base, chat)
    results["base"] = measure(chat, chat)
    if args.start is None:
        args.start = folder / "upcycled"
        run("convert", "--hf-path", base, "--save", args.start, "--num-new-experts", 2, "--topk", 2, "--overwrite")
    results["start"] = measure(chat, exported(args.start, folder / "start-hf"))
    data = [word for language in ("el", "en") for word in ("1", folder / f"{language}_messages_document")]
    for name, stage, before, *words in RUNS:
        save = folder / name
        shutil.rmtree(save, ignore_errors=True)
        checkpoint = args.start if before == "start" else folder / before
        fixed = ["--pretrained-checkpoint", checkpoint, "--data-path", *data, "--save", save]
        run("train", stage, *fixed, *TRAIN.format(steps=args.steps).split(), *words)
        results[name] = measure(chat, exported(save, folder / f"{name}-hf"))
        (folder / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    for name, found in results.items():
        print(name, *(f"  {key}: {value}" for key, value in found.items()), sep="\n")


if __name__ == "__main__":
    run_command(main)
