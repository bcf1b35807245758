"""GGUF files, tokenized and computed by llama.cpp, whose library comes with the extra `gguf`."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moelpr.base.errors import UserError
from moelpr.base.versions import require_package

_MOST_HEADER_BYTES = 64 << 20
_RANGES = {"block_count": (1, 512), "expert_count": (0, 512), "expert_used_count": (0, 64)}  # llama.cpp's limits


def check_header(path: Path) -> None:
    """Raise a UserError for numbers for which llama.cpp aborts the process, instead of an error."""
    with open(path, "rb") as file:
        header = file.read(_MOST_HEADER_BYTES) + bytes(8)
    values = dict.fromkeys(_RANGES, 0)
    for name, (least, most) in _RANGES.items():
        # The key, its type (an integer of 4 or 8 bytes), and the value.
        for found in re.finditer(rb"\.%s([\4\5\12\13])\0\0\0(.{8})" % name.encode(), header, re.DOTALL):
            values[name] = int.from_bytes(found[2][: 4 if found[1] in b"\4\5" else 8], "little")
            if not least <= values[name] <= most:
                raise UserError(f"{path} has {name} {values[name]}; write it again with moelpr model gguf")
    if not (experts := values["expert_count"]) >= (used := values["expert_used_count"]) or (experts and not used):
        raise UserError(f"{path} uses {used} of {experts} experts; write it again with moelpr model gguf")


@cache
def library() -> SimpleNamespace:
    """llama.cpp's C functions (`lib`) and cffi's access to them (`ffi`), without their log.

    Raises:
        UserError: The package that contains them is not installed.
    """
    require_package("llama_cpp_py_sync", "gguf")
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    silent = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, data: None)
    lib.llama_log_set(silent, ffi.NULL)
    return SimpleNamespace(ffi=ffi, lib=lib, silent=silent)


class Gguf:
    """A model of llama.cpp, or only its tokenizer, which has the methods of transformers' that scores need."""

    unk_token_id = None

    def __init__(self, path: Path, vocab_only: bool = False):
        check_header(path)
        self._c = library()
        params = self._c.lib.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = vocab_only, 0
        self._model = self._c.lib.llama_model_load_from_file(str(path).encode(), params)
        if self._model == self._c.ffi.NULL:
            raise UserError(
                f"llama.cpp cannot load {path}; write it again with moelpr model gguf, or use a newer llama.cpp"
            )
        self._vocab = self._c.lib.llama_model_get_vocab(self._model)
        self._context, self._length = self._c.ffi.NULL, 0

    def close(self) -> None:
        self._c.lib.llama_free(self._context)
        self._c.lib.llama_model_free(self._model)

    @property
    def vocab_size(self) -> int:
        return self._c.lib.llama_vocab_n_tokens(self._vocab)

    @property
    def eos_id(self) -> int:
        return self._c.lib.llama_vocab_eos(self._vocab)

    @property
    def start_id(self) -> int:
        """BOS, or EOS if the file names none (llama.cpp then takes one of its own)."""
        return int(self.metadata("tokenizer.ggml.bos_token_id") or self.eos_id)

    def metadata(self, key: str) -> str:
        """The text of a key; empty if the file does not have it."""
        buffer = self._c.ffi.new("char[256]")
        length = self._c.lib.llama_model_meta_val_str(self._model, key.encode(), buffer, 256)
        return self._c.ffi.string(buffer).decode() if length >= 0 else ""

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}

    def encode(self, text: str) -> list[int]:
        raw = text.encode()
        ids = self._c.ffi.new("llama_token[]", len(raw) + 8)
        return list(ids[0 : self._c.lib.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), False, False)])

    def decode(self, ids: list[int]) -> str:
        tokens, size = self._c.ffi.new("llama_token[]", ids), 64 * len(ids) + 64
        buffer = self._c.ffi.new("char[]", size)
        count = self._c.lib.llama_detokenize(self._vocab, tokens, len(ids), buffer, size, False, False)
        return self._c.ffi.buffer(buffer, max(0, count))[:].decode(errors="replace")

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, vocabulary] in fp32."""
        return torch.stack([self._row(row) for row in tokens_BS.tolist()])

    def _row(self, tokens: list[int]) -> Tensor:
        lib, ffi, length = self._c.lib, self._c.ffi, len(tokens)
        if length > self._length:  # batches come with the longest first
            lib.llama_free(self._context)
            params = lib.llama_context_default_params()
            params.n_ctx = params.n_batch = params.n_ubatch = self._length = length
            params.n_seq_max = 1
            params.n_threads = params.n_threads_batch = torch.get_num_threads()
            self._context = lib.llama_init_from_model(self._model, params)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(length, 0, 1)
        for number, token in enumerate(tokens):
            batch.token[number], batch.pos[number], batch.n_seq_id[number] = token, number, 1
            batch.seq_id[number][0], batch.logits[number] = 0, 1
        batch.n_tokens = length
        code = lib.llama_decode(self._context, batch)
        lib.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama.cpp could not compute {length} tokens (code {code})")
        shape = length, self.vocab_size
        numbers = ffi.buffer(lib.llama_get_logits(self._context), 4 * shape[0] * shape[1])
        return torch.frombuffer(bytearray(numbers), dtype=torch.float32).reshape(shape)
