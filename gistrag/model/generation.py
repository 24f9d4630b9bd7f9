"""From a memory and a prompt to an answer, token by token.

`generate` is a plain generator: its first ``next`` is the time to first token, and closing it ends the work. It
keeps the contract of an external cache: positions go on where the memory ends, which is not where its
slots end, and every token may look at every slot. A missing position or mask would give fluent wrong text and no error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gistrag.errors import ContextOverflowError
from gistrag.kv.cache import Memory, side_by_side
from gistrag.model.gist_model import GistModel


def generate(
    model: GistModel,
    memory: Memory,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the token ids of the answer to the prompt *ids*, read behind *memory*.

    Args:
        max_new_tokens: where an answer is cut that does not end by itself.
        temperature: 0 takes the likeliest token; above, tokens are drawn with *seed*.

    Raises:
        ContextOverflowError: memory and prompt leave no position for an answer.
    """
    position = memory.next_position
    require_room(model, position + len(ids))
    randomness = torch.Generator(model.device).manual_seed(seed)
    reading = model.read(memory)
    hidden = reading.feed(torch.tensor([list(ids)]), positions=position + torch.arange(len(ids)), role="answers")
    position += len(ids)
    room = min(max_new_tokens, model.window - position)
    for count in range(room):
        token = pick(model.logits(hidden[:, -1]).float(), temperature, randomness)  # (1,)
        if token.item() in model.stop_ids:
            return
        yield int(token.item())
        if count + 1 < room:
            hidden = reading.feed(token[None], positions=torch.tensor([position + count]), role="answers")


def read_text(model: GistModel, memory: Memory, ids: Sequence[int]) -> Memory:
    """Return *memory* with passages read as text behind it, which take no adapter.

    Raises:
        ContextOverflowError: they leave no position for a question.
    """
    if not ids:
        return memory
    begin = memory.next_position
    require_room(model, begin + len(ids))
    reading = model.read(memory)
    reading.feed(torch.tensor([list(ids)]), positions=begin + torch.arange(len(ids)))
    return reading.memory(begin + len(ids))


def generate_together(
    model: GistModel, memories: Sequence[Memory], prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 256
) -> list[list[int]]:
    """Return what `generate` says at temperature 0 for each memory and prompt, computed side by side.

    Rows are padded on the left, so that all end at the same column; padding is never looked at.
    """
    behind = side_by_side(memories)
    ids, real = _padded_left(prompts)
    count = ids.shape[1]
    begins = torch.tensor([memory.next_position for memory in memories])[:, None]
    positions = (begins + real.cumsum(dim=1) - 1).clamp(min=0)  # (batch, n)
    visible = torch.cat((behind.real, real), dim=1)  # (batch, slots + n)
    causal = torch.ones(count, visible.shape[1], dtype=torch.bool).tril(behind.slots)
    itself = torch.eye(count, dtype=torch.bool)  # a padding row must look somewhere, or its softmax is not a number
    mask = causal & visible[:, None]
    mask[:, :, behind.slots :] |= itself

    reading = model.read_behind(behind)
    hidden = reading.feed(ids, positions=positions, mask=mask, role="answers")
    said: list[list[int]] = [[] for _ in prompts]
    talking = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        tokens = model.logits(hidden[:, -1]).float().argmax(dim=-1).cpu()  # (batch,)
        talking -= {row for row in talking if tokens[row].item() in model.stop_ids}
        for row in talking:
            said[row].append(int(tokens[row]))
        if not talking:
            break
        positions = positions[:, -1:] + 1
        visible = torch.cat((visible, torch.ones(len(prompts), 1, dtype=torch.bool)), dim=1)
        hidden = reading.feed(tokens[:, None], positions=positions, mask=visible[:, None], role="answers")
    return said


def _padded_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and which of them are real, both ``(batch, n)``."""
    count = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (count - len(row)) + list(row) for row in rows])
    empty = torch.tensor([count - len(row) for row in rows])
    return ids, torch.arange(count) >= empty[:, None]


def require_room(model: GistModel, used: int) -> None:
    """Return if *used* positions leave room for an answer.

    Raises:
        ContextOverflowError: they do not.
    """
    if used >= model.window:
        raise ContextOverflowError(
            f"passages and question take {used} positions, the model's window has {model.window}; "
            "ask a shorter question or for fewer chunks"
        )


def decode_stream(model: GistModel, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of *tokens* piece by piece, holding back characters that are not whole yet."""
    ids: list[int] = []
    said = ""
    for token in tokens:
        ids.append(token)
        text = model.decode(ids)
        if len(text) > len(said) and not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    if rest := model.decode(ids)[len(said) :]:
        yield rest


def pick(logits: Tensor, temperature: float, randomness: torch.Generator) -> Tensor:
    """Return the next token of each row, ``(batch,)``."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=randomness)[:, 0]
