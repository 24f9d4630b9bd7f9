"""The tokenizer that reads documents treats special tokens as text, and leaves the model's own tokenizer alone."""

from __future__ import annotations

from support.tiny_models import byte_tokenizer

from gistrag.model.tokenizer import plain_tokenizer


def test_special_tokens_are_plain_text() -> None:
    """A document that contains a control token is read as its letters; the model's own tokenizer is unchanged."""
    own = byte_tokenizer()

    plain = plain_tokenizer(own)

    assert len(plain.encode("<|im_start|>").ids) == len("<|im_start|>")
    assert len(own.backend_tokenizer.encode("<|im_start|>").ids) == 1


def test_a_tokenizer_that_truncates_and_pads_reads_the_whole_text() -> None:
    """Truncation and padding of the model's own tokenizer do not reach the copy."""
    own = byte_tokenizer()
    own.backend_tokenizer.enable_truncation(4)
    own.backend_tokenizer.enable_padding(length=9)

    plain = plain_tokenizer(own)

    assert len(plain.encode("six letters").ids) == 11
    assert len(plain.encode("").ids) == 0
