"""GGUF files by `moelpr model gguf`: tokens, bits per byte and prompts are transformers', also when quantized."""

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint_convert.gguf.chat_format import ChatFormat
from checkpoint_convert.gguf.write import write_gguf
from moelpr.base.errors import UserError
from moelpr.measure.evaluate.compare import compare_models
from moelpr.measure.evaluate.scoring import Settings
from moelpr.model.families.new_experts import NewExperts
from tests.support.chat_templates import CHATML_WITH_DEFAULT, CONVERSATIONS, EXPRESSIBLE
from tests.support.hf_models import write_export
from tests.support.small_tokenizers import byte_level_bpe

TEXT = ["Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.", "There are 12 cats, isn't it?  光が見える 3 33 333"] * 4
_GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Case struct { Template, System string; Messages []Message }
func main() {
  var cases []Case
  if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
  for _, c := range cases {
    if err := template.Must(template.New("").Parse(c.Template)).Execute(os.Stdout, c); err != nil { panic(err) }
    os.Stdout.WriteString("\\x00")
  }
}
"""


@pytest.fixture(scope="module")
def export(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upcycled Llama with GPT-2's pre-tokenizer, a vocabulary of its own and ChatML."""
    from transformers import PreTrainedTokenizerFast

    bpe = byte_level_bpe(TEXT, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    shape = {"vocab_size": bpe.get_vocab_size(), "hidden_size": 64, "intermediate_size": 96}
    dense = make_model("LlamaForCausalLM", max_position_embeddings=512, **shape)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", bos_token="<|endoftext|>")
    tokenizer.chat_template = CHATML_WITH_DEFAULT
    tokenizer.save_pretrained(dense)
    return write_export(dense, tmp_path_factory.mktemp("gguf"), NewExperts(3, original_copies=2), noise=0.5)


@pytest.fixture(scope="module")
def files(export: Path) -> Path:
    """The folder with GGUF files of the export."""
    save = export.with_name("gguf")
    lines = write_gguf(export, save, ["Q8_0"], with_modelfile=True, pre_tokenizer="gpt-2")
    files = ("hf.gguf", "hf-Q8_0.gguf", "Modelfile")
    assert [line.split(":")[0] for line in lines] == [str(save / name) for name in files]
    return save


def test_bits_per_byte_are_transformers_and_nearly_so_in_8_bits(export: Path, files: Path) -> None:
    models = {"hf": export, "gguf": files / "hf.gguf", "q8": files / "hf-Q8_0.gguf"}
    actual = compare_models(models, {"el": TEXT[:1], "en": TEXT[1:2]}, Settings(32, 8)).scores
    for language in ("el", "en"):
        bits = {name: scores[language].metrics["bits_per_byte"] for name, scores in actual.items()}
        assert actual["hf"][language].document_tokens == actual["gguf"][language].document_tokens
        assert abs(bits["gguf"] - bits["hf"]) < 2e-3
        assert 0 < abs(bits["q8"] - bits["hf"]) < 0.05


def test_an_unknown_pre_tokenizer_is_named_and_a_wrong_one_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ByteLevel, hash \w{12}\).*--pre-tokenizer"):
        write_gguf(export, tmp_path / "gguf")
    with pytest.raises(UserError, match="first after .*another --pre-tokenizer than qwen2"):
        write_gguf(export, tmp_path / "gguf", pre_tokenizer="qwen2")
    assert not any(tmp_path.iterdir())


def test_a_conversation_has_the_same_prompt_in_llama_cpps_server(export: Path, files: Path) -> None:
    import xllamacpp
    from transformers import AutoTokenizer

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(files / "hf-Q8_0.gguf"), 512, 1, False
    params.hostnames, params.port, params.use_jinja = ["127.0.0.1"], 0, True
    server = xllamacpp.Server(params)
    tokenizer = AutoTokenizer.from_pretrained(export)
    for messages in CONVERSATIONS:
        body = json.dumps({"messages": messages}).encode()
        request = urllib.request.Request(f"{server.listening_address}/apply-template", body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            prompt = json.load(answer)["prompt"]
        assert prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_ollamas_templates_render_what_jinja_does(tmp_path: Path) -> None:
    """In Go's text/template, which Ollama uses, with the fields that it fills in."""
    if shutil.which("go") is None:
        pytest.skip("Go is missing; `make test-readers` installs Debian's")
    from transformers.utils.chat_template_utils import render_jinja_template

    cases, expected = [], []
    for template in EXPRESSIBLE.values():
        special = {"bos_token": "", "eos_token": "</s>"}

        def render(messages, answer, template=template, special=special) -> str:
            settings = {"chat_template": template, "add_generation_prompt": answer}
            return render_jinja_template(conversations=[messages], **settings, **special)[0][0]

        actual = ChatFormat.of(render)
        for messages in CONVERSATIONS:
            if actual.system is None and messages[0]["role"] == "system":
                continue
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            cases.append({"Template": actual.go_template(), "System": system, "Messages": messages})
            expected.append(render(messages, True))
    (tmp_path / "render.go").write_text(_GO)
    command = ["go", "run", "render.go"]
    run = subprocess.run(command, cwd=tmp_path, input=json.dumps(cases), capture_output=True, text=True, check=True)
    assert run.stdout.split("\0")[:-1] == expected
