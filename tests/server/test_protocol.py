"""The wire format: requests, and how an answer is cut and counted."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gistrag.answering.answer import Answer, Options, Source, Usage
from gistrag.server.protocol import APIError, ChatRequest, cut, footnotes, usage

ASKED = {"model": "manual", "messages": [{"role": "user", "content": "How long?"}]}


def test_a_request_becomes_options() -> None:
    """OpenAI's settings and gistrag's become options of an answer; unknown settings are ignored."""
    body = ChatRequest.model_validate(
        {**ASKED, "max_tokens": 12, "temperature": 0.5, "seed": 3, "top_p": 0.9, "tools": [], "user": "somebody",
         "gistrag": {"mode": "hybrid", "top_k": 5, "scope": "a.md", "filters": {"kind": "pdf"}}}
    )  # fmt: skip

    expected = Options(
        top_k=5, mode="hybrid", scope="a.md", filters={"kind": "pdf"}, max_new_tokens=12, temperature=0.5, seed=3
    )
    assert body.options == expected
    assert Options() == ChatRequest.model_validate(ASKED).options


def test_content_may_come_in_parts() -> None:
    """The parts of a message become its lines, and only messages of the user count as questions."""
    parts = [{"type": "text", "text": "How long"}, {"type": "text", "text": "is it?"}]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": None},
        {"role": "user", "content": parts},
        {"role": "user", "content": "  "},
    ]

    assert ChatRequest.model_validate({**ASKED, "messages": messages}).questions == ["How long\nis it?"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]},
        {"messages": [{"role": "user", "content": "half \ud83d"}]},
        {"model": None},
        {"n": 2},
        {"max_tokens": 0},
        {"max_tokens": 4097},
        {"max_completion_tokens": 4097},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"seed": 2**63},
        {"logprobs": True},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"gistrag": {"top_k": 0}},
        {"gistrag": {"top_k": 65}},
        {"gistrag": {"mode": "both"}},
        {"gistrag": {"topk": 3}},
        {"gistrag": {"filters": {"path": "*" * 201}}},
        {"stop": ["a"] * 17},
        {"model": "a" * 201},
    ],
)
def test_unsupported_requests_are_refused(wrong: dict[str, Any]) -> None:
    """A value out of range, or a setting gistrag cannot follow, makes a request invalid."""
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({**ASKED, **wrong})


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["a", "b"], [], "ab"),
        (["\n ", " a ", " "], [], "a  "),
        (["one END two"], ["END"], "one "),
        (["one E", "N", "D two", " three"], ["END"], "one "),
        (["one E", "NX"], ["END"], "one ENX"),
        (["one EN"], ["END"], "one EN"),
        (["a##b\n"], ["\n", "##"], "a"),
        ([], ["x"], ""),
    ],
)
def test_stops(pieces: list[str], stops: list[str], expected: str) -> None:
    """An answer ends before the first stop, wherever the pieces are cut; leading white space is dropped."""
    assert "".join(cut(iter(pieces), stops)) == expected


def test_usage_counts_gists_as_cached() -> None:
    """The token counts add up, and include the text that the gists stand for."""
    counts = usage(
        Answer("a", usage=Usage(gist_slots=10, source_tokens=40, text_tokens=5, question_tokens=3, answer_tokens=2))
    )

    assert counts["prompt_tokens"] == 18
    assert counts["completion_tokens"] == 2
    assert counts["total_tokens"] == 20
    assert counts["prompt_tokens_details"]["cached_tokens"] == 10
    assert counts["gist_slots"] == 10
    assert counts["source_tokens"] == 40


def test_footnotes_name_the_sources() -> None:
    """Footnotes number the sources; an answer without sources has none."""
    source = Source("a.md", None, ("Top", "Sub"), 0, 9, 1.0, "words", 1, False)

    assert footnotes(Answer("a", (source, source))) == "\n\n[1] a.md, Top > Sub\n[2] a.md, Top > Sub"
    assert footnotes(Answer("a")) == ""


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
     (404, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")],
)  # fmt: skip
def test_errors_have_the_form_of_the_api(status: int, kind: str) -> None:
    """An error has message, type, param and code, and nothing else."""
    body = APIError(status, "some_code", "what is wrong", param="model").body()

    assert body == {"error": {"message": "what is wrong", "type": kind, "param": "model", "code": "some_code"}}
