"""llama.cpp answering from text, driven by `peers.py` over standard input and output.

    python llama_cpp_worker.py model.gguf THREADS SLOTS

It imports nothing but llama_cpp. Flash attention and the type of the cache are left to llama.cpp. The first line of
output says how long the model took to load; from then on each line of input, a JSON object, is answered by one line.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

STARTED_S = time.perf_counter()

import llama_cpp as llama  # type: ignore[import-not-found]  # noqa: E402

IMPORTED_S = time.perf_counter()


class Llama:
    """A model and its one context.

    Args:
        path: of a GGUF file; threads: for prompt and decoding; slots: of the context.
    """

    def __init__(self, path: str, threads: int, slots: int) -> None:
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        params.n_threads = params.n_threads_batch = threads
        params.n_ctx = slots
        self._context = llama.llama_init_from_model(self._model, params)
        self._vocabulary = llama.llama_model_get_vocab(self._model)
        self._memory = llama.llama_get_memory(self._context)
        self._greedy = llama.llama_sampler_init_greedy()

    def encode(self, texts: Sequence[str]) -> list[int]:
        """Return the token ids of the pieces of a prompt, each tokenized apart as gistrag does."""
        ids: list[int] = []
        for text in (text.encode() for text in texts):
            room = (llama.llama_token * (len(text) + 1))()
            count = llama.llama_tokenize(self._vocabulary, text, len(text), room, len(room), False, True)
            ids += room[:count]
        return ids

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens behind those that the context holds."""
        tokens = (llama.llama_token * len(ids))(*ids)  # a batch points to it, and does not hold it
        code = llama.llama_decode(self._context, llama.llama_batch_get_one(tokens, len(ids)))
        if code != 0:
            raise RuntimeError(f"expected 0 of llama_decode, got {code}: does the prompt fit into the context?")

    def generate(self, count: int, *, stops: bool) -> list[int]:
        """Return *count* greedy tokens, or those before the end of the answer."""
        tokens: list[int] = []
        while len(tokens) < count:
            if tokens:
                self.read(tokens[-1:])
            token = llama.llama_sampler_sample(self._greedy, self._context, -1)
            if stops and llama.llama_vocab_is_eog(self._vocabulary, token):
                break
            tokens.append(token)
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        room = ctypes.create_string_buffer(256)
        sizes = (llama.llama_token_to_piece(self._vocabulary, one, room, len(room), 0, False) for one in ids)
        return b"".join(room.raw[:size] for size in sizes).decode("utf-8", "replace")

    def answer(self, pieces: Sequence[str], *, kept: int, new_tokens: int, stops: bool) -> dict[str, Any]:
        """Return text, tokens and seconds of an answer.

        Args:
            pieces: of the prompt; the first *kept* of them stand in the context before the clock starts.
            stops: whether the answer may end before *new_tokens*.
        """
        llama.llama_memory_clear(self._memory, True)
        if before := self.encode(pieces[:kept]):
            self.read(before)
            llama.llama_synchronize(self._context)
        started_s = time.perf_counter()
        prompt = self.encode(pieces[kept:])
        self.read(prompt)
        tokens = self.generate(1, stops=False)
        first_s = time.perf_counter()
        self.read(tokens)
        tokens += self.generate(new_tokens - 1, stops=stops)
        return {
            "ttft_s": first_s - started_s,
            "total_s": time.perf_counter() - started_s,
            "answer_tokens": len(tokens),
            "context_slots": len(before) + len(prompt),
            "text": self.decode(tokens),
        }


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def silent(level: int, text: bytes, data: Any) -> None:
    """Drop a line of llama.cpp's log."""


def main() -> None:
    """Load the model, then answer line by line."""
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    path, threads, slots = sys.argv[1:]
    loading_s = time.perf_counter()
    model = Llama(path, int(threads), int(slots))
    ready = {
        "import_s": IMPORTED_S - STARTED_S,
        "load_s": time.perf_counter() - loading_s,
        "version": llama.__version__,
        "system": llama.llama_print_system_info().decode(),
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(model.answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
