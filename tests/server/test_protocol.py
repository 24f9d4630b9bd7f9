"""The wire format: requests, and how an answer is cut and counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import ValidationError

from gistrag.answering.answer import Answer, Evidence, Options, Source, Usage
from gistrag.server.protocol import APIError, ChatRequest, cut, details, footnotes, usage

ASKED = {"model": "manual", "messages": [{"role": "user", "content": "How long?"}]}
SOURCE = Source("a.md", None, ("Top", "Sub"), 0, 9, 1.0, "words", 1, False)


def carried(sentence: str, answer: str = "80", **judged: Any) -> Answer:
    """Return an answer that the second of two sources carries."""
    evidence = Evidence(40, 40 + len(sentence), sentence, ("Top", "Prices"), None, True)
    return Answer(answer, (SOURCE, dataclasses.replace(SOURCE, chunk_id=2, evidence=evidence)), **judged)


def test_a_request_becomes_options() -> None:
    """OpenAI's settings and gistrag's become options of an answer; unknown settings are ignored."""
    body = ChatRequest.model_validate(
        {**ASKED, "max_tokens": 12, "temperature": 0.5, "seed": 3, "top_p": 0.9, "tools": [], "user": "somebody",
         "gistrag": {
             "mode": "hybrid", "top_k": 5, "scope": "a.md", "filters": {"kind": "pdf"}, "second_reading": False}}
    )  # fmt: skip

    expected = Options(
        top_k=5,
        mode="hybrid",
        scope="a.md",
        filters={"kind": "pdf"},
        max_new_tokens=12,
        temperature=0.5,
        seed=3,
        second_reading=False,
    )
    assert body.options() == expected
    assert Options() == ChatRequest.model_validate(ASKED).options()


@pytest.mark.parametrize(
    ("asked", "served", "expected"), [(None, False, False), (True, False, True), (False, True, False)]
)
def test_a_request_decides_on_the_second_reading(asked: bool | None, served: bool, expected: bool) -> None:
    """What the server was started with counts where a request does not say."""
    body = ChatRequest.model_validate({**ASKED, "gistrag": {"second_reading": asked}})

    assert body.options(second_reading=served).second_reading == expected


def test_settings_that_change_nothing_are_named() -> None:
    """Fields that are ignored are listed, whatever their names, and messages that are; empty ones ask for nothing."""
    messages = [{"role": role, "content": "a"} for role in ("tool", "system", "system", "assistant", "user")]
    extra = {"top_p": 0.5, "tools": [], "user": None, "questions": ["x"], "a" * 300: 1}
    body = ChatRequest.model_validate({**ASKED, "messages": messages, **extra})

    assert body.ignored == ["top_p", "questions", "a" * 200, "messages.system", "messages.tool"]
    assert body.questions == ["a"]
    assert ChatRequest.model_validate(ASKED).ignored == []
    assert len(ChatRequest.model_validate({**ASKED, **{f"x{n}": n for n in range(999)}}).ignored) == 32


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
        {"half \ud83d": 1},
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
        {"gistrag": {"second_reading": "sometimes"}},
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
    assert footnotes(Answer("a", (SOURCE, SOURCE))) == "\n\n[1] a.md, Top > Sub\n[2] a.md, Top > Sub"
    assert footnotes(Answer("a")) == ""


def test_footnotes_quote_the_evidence() -> None:
    """The answer gets the number of the source that carries it, and that line quotes the sentence under its heading."""
    answer = carried("It takes\n  80 litres.", confidence=0.9, verdict="answered")

    assert footnotes(answer) == " [2]\n\n[1] a.md, Top > Sub\n[2] a.md, Top > Prices: “It takes 80 litres.”"


def test_footnotes_say_what_is_doubtful() -> None:
    """An unsure answer says so, with what stands in no passage; a refusal has no mark."""
    unsure = carried("It takes 80.", "Lee, 90", confidence=0.4, verdict="unsure", unsupported=("Lee", "90"))
    refusal = carried("It takes 80.", "The passages do not say.", verdict="not found", withheld="90")

    assert footnotes(unsure).startswith(
        " [2]\n\nNot sure: compare it with the passage. In no passage: Lee, 90.\n\n[1] "
    )
    assert footnotes(refusal) == "\n\n[1] a.md, Top > Sub\n[2] a.md, Top > Prices"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("![a](http://evil.example/80.png)", "![a] (http://evil.example/80.png)"),
        ("![a][b] <img src=x onerror=y> 8 < 80", "![a] [b] < img src=x onerror=y> 8 < 80"),
        ("80\u202e\x1b[2J litres", "80 [2J litres"),
        ("المضخة تستهلك 80 لترا.", "المضخة تستهلك 80 لترا."),
    ],
)
def test_a_quote_is_no_markup(sentence: str, expected: str) -> None:
    """A front-end that shows Markdown loads no image that a document names, and makes no tag or link of its text."""
    assert footnotes(carried(sentence)).endswith(f": “{expected}”")


@pytest.mark.parametrize("sentence", ["so " * 500 + "80 litres " + "or " * 500, "가" * 1000 + " 80 " + "나" * 1000])
def test_a_long_sentence_is_cut_around_the_answer(sentence: str) -> None:
    """Of a sentence of 2,000 characters a footnote shows a part, which holds the answer."""
    quote = footnotes(carried(sentence)).rpartition("“")[2]

    assert "80" in quote
    assert quote.startswith("…")
    assert quote.endswith("…”")
    assert 280 < len(quote) < 340


def test_details_hold_what_is_thought_of_an_answer() -> None:
    """Confidence, verdict and evidence are JSON; without a calibration they are null."""
    judged = details(carried("It takes 80.", confidence=0.9, verdict="answered", withheld="90", unsupported=("90",)))
    plain = details(Answer("a", (SOURCE,)))

    assert (judged["confidence"], judged["verdict"], judged["unsupported"]) == (0.9, "answered", ["90"])
    assert (judged["withheld"], judged["quote"], plain["quote"]) == ("90", "It takes 80.", "")
    assert judged["sources"][0]["evidence"] is None
    assert judged["sources"][1]["evidence"] == {
        "start": 40, "end": 52, "text": "It takes 80.", "heading": ("Top", "Prices"), "page": None,
        "is_supported": True,
    }  # fmt: skip
    assert judged["usage"]["readings"] == 0
    assert (plain["confidence"], plain["verdict"], plain["unsupported"]) == (None, None, [])


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
     (404, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")],
)  # fmt: skip
def test_errors_have_the_form_of_the_api(status: int, kind: str) -> None:
    """An error has message, type, param and code, and nothing else."""
    body = APIError(status, "some_code", "what is wrong", param="model").body()

    assert body == {"error": {"message": "what is wrong", "type": kind, "param": "model", "code": "some_code"}}
