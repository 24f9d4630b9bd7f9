"""From a memory and a prompt to an answer, token by token.

One loop decodes: `decode_steps` lets a batch of rows read their prompts behind their memories and generate side by
side. `generate` is its batch of one, a plain generator: the first ``next`` takes the time to first token, and closing
it ends the work.

Positions continue where a memory ends, which differs from the number of its slots, and every token attends to every
slot. A missing position or mask would give fluent wrong text and no error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from tokenizers.decoders import DecodeStream
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
        max_new_tokens: an answer that does not end by itself is cut here.
        temperature: 0 takes the most likely token; above 0, tokens are sampled with *seed*.

    Raises:
        ContextOverflowError: memory and prompt leave no position for an answer.
    """
    room = min(max_new_tokens, require_room(model, memory.next_position + len(ids)))
    for tokens in decode_steps(model, [memory], [ids], max_new_tokens=room, temperature=temperature, seed=seed):
        yield from tokens.values()


def generate_batch(
    model: GistModel, memories: Sequence[Memory], prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 256
) -> list[list[int]]:
    """Return what `generate` yields at temperature 0 for each memory and prompt, computed as one batch."""
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in decode_steps(model, memories, prompts, max_new_tokens=max_new_tokens):
        for row, token in tokens.items():
            answers[row].append(token)
    return answers


def decode_steps(
    model: GistModel,
    memories: Sequence[Memory],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[dict[int, int]]:
    """Yield the next token of every unfinished row, by row number, one decode step after the other.

    Rows are padded on the left, so that all end in the same column; nothing attends to padding. A batch of one has
    none and needs no mask.
    """
    batch = side_by_side(memories)
    ids, is_token = _padded_left(prompts)
    begins = torch.tensor([memory.next_position for memory in memories])[:, None]
    positions = (begins + is_token.cumsum(dim=1) - 1).clamp(min=0)  # (batch, n)
    visible = torch.cat((batch.real, is_token), dim=1)  # (batch, slots + n)
    is_padded = not bool(visible.all())
    mask = _causal(visible, ids.shape[1]) if is_padded else None
    randomness = torch.Generator(model.device).manual_seed(seed) if temperature else None
    reading = model.read_behind(batch)
    unfinished = set(range(len(prompts)))
    for step in range(max_new_tokens):
        if step and is_padded:
            visible = torch.cat((visible, torch.ones(len(prompts), 1, dtype=torch.bool)), dim=1)
            mask = visible[:, None]
        hidden = reading.feed(ids, positions=positions, mask=mask, role="answers")
        picked = _pick(model.logits(hidden[:, -1]).float(), temperature, randomness).cpu()
        tokens = picked.tolist()
        unfinished -= {row for row in unfinished if tokens[row] in model.stop_ids}
        if not unfinished:
            return
        yield {row: tokens[row] for row in sorted(unfinished)}
        ids, positions = picked[:, None], positions[:, -1:] + 1


def _causal(visible: Tensor, count: int) -> Tensor:
    """Return the mask ``(batch, n, slots + n)`` of *count* prompt columns behind a memory, True where a token attends.

    Args:
        visible: ``(batch, slots + n)`` bool, False for padding.
    """
    slots = visible.shape[1] - count
    mask = torch.ones(count, visible.shape[1], dtype=torch.bool).tril(slots) & visible[:, None]
    mask[:, :, slots:] |= torch.eye(count, dtype=torch.bool)  # softmax over nothing is not a number
    return mask


def _padded_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and which of them are tokens rather than padding, both ``(batch, n)``."""
    count = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (count - len(row)) + list(row) for row in rows])
    padding = torch.tensor([count - len(row) for row in rows])
    return ids, torch.arange(count) >= padding[:, None]


def _pick(logits: Tensor, temperature: float, randomness: torch.Generator | None) -> Tensor:
    """Return the next token of each row, ``(batch,)``."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=randomness)[:, 0]


def read_text(model: GistModel, memory: Memory, ids: Sequence[int]) -> Memory:
    """Return *memory* with passages read as text behind it, without the adapter.

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


def require_room(model: GistModel, used: int) -> int:
    """Return how many positions remain for an answer behind *used* ones.

    Raises:
        ContextOverflowError: none.
    """
    if used >= model.window:
        raise ContextOverflowError(
            f"passages and question take {used} positions, the model's context window has {model.window}; "
            "ask a shorter question or for fewer chunks"
        )
    return model.window - used


def decode_stream(model: GistModel, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of *tokens* piece by piece; a character whose bytes are incomplete waits for the next token."""
    stream = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        if piece := stream.step(model.text_tokenizer, token):
            yield piece
