"""Tokenizers that read a document as plain text, and chat templates that never change with the day."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer


def renderer(tokenizer: Any) -> Callable[[list[dict[str, str]]], str] | None:
    """Return what renders chat messages to a prompt that ends where the assistant begins; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(messages: list[dict[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            chat_template=_FIXED_DAY + tokenizer.get_chat_template(),
        )
        return text

    return render


# Some templates print the date; a prefix that changes overnight would invalidate every gist.
_FIXED_DAY = "{% macro strftime_now(form) %}01 Jan 2026{% endmacro %}"


def plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """Return a copy of the tokenizer, of transformers or tokenizers, for which special tokens are ordinary text."""
    copy = Tokenizer.from_str(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy
