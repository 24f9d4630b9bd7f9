"""The sentences that are shown as an answer or around one, in the language of the question: English or Korean.

Not here: what a command tells the person who runs it, which is English, and what a model is trained to write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from gistrag.qa.stop_words import STOP_WORDS

Language = Literal["en", "ko"]
Phrase = Literal[
    "refusal",
    "no documents",
    "no passages",
    "no texts",
    "greeting",
    "thanks",
    "goodbye",
    "about none",
    "about one",
    "about some",
    "about many",
    "sure",
    "unsure",
    "not found",
    "guessed",
    "evidence",
    "compare",
    "unsupported",
]

PHRASES: Mapping[Phrase, tuple[str, str]] = {
    "refusal": ("The passages do not say.", "찾은 글에는 나와 있지 않습니다."),
    "no documents": ("There are no documents in this index.", "이 색인에는 문서가 없습니다."),
    "no passages": ("No passage of this index passes the filters.", "이 색인에는 조건에 맞는 글이 없습니다."),
    "no texts": ("There are no passages to answer from.", "답을 찾을 글이 없습니다."),
    "greeting": ("Hello! ", "안녕하세요! "),
    "thanks": ("You are welcome! ", "천만에요! "),
    "goodbye": ("Goodbye! ", "안녕히 가세요! "),
    "about none": (
        "I answer questions from the documents of this index, but there are none in it yet.",
        "이 색인의 문서를 바탕으로 질문에 답하지만, 아직 문서가 없습니다.",
    ),
    "about one": (
        "I answer questions from the one document of this index: {last}.",
        "이 색인의 문서 1개를 바탕으로 질문에 답합니다: {last}.",
    ),
    "about some": (
        "I answer questions from the {count:,} documents of this index: {names} and {last}.",
        "이 색인의 문서 {count:,}개를 바탕으로 질문에 답합니다: {names}, {last}.",
    ),
    "about many": (
        "I answer questions from the {count:,} documents of this index: {names}, {last} and {more:,} more.",
        "이 색인의 문서 {count:,}개를 바탕으로 질문에 답합니다: {names}, {last} 외 {more:,}개.",
    ),
    "sure": ("Sure{percent}.", "확실함{percent}."),
    "unsure": ("Not sure{percent}.", "확실하지 않음{percent}."),
    "not found": ("Not found.", "찾지 못함."),
    "guessed": ("Not found. The model guessed {guess!r}{percent}.", "찾지 못함. 모델의 짐작은 {guess!r}{percent}."),
    "evidence": ("The passage says:", "본문:"),
    "compare": ("Not sure: compare it with the passage.", "확실하지 않습니다. 본문과 견주어 보세요."),
    "unsupported": ("In no passage:", "본문에 없는 말:"),
}
"""Each sentence in English and in Korean."""

REFUSAL = PHRASES["refusal"][0]
"""The answer to a question that no passage answers, as adapters are trained to write it."""

HANGUL = re.compile("[\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e]")
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> Language:
    """Return the language to answer a text in: Korean if it has Hangul, unless it is English that names something so.

    >>> language_of("API key가 뭐야?"), language_of("Who is 국나래?"), language_of("Was kostet das?")
    ('ko', 'en', 'en')
    """
    if not HANGUL.search(text):
        return "en"
    words = _WORD.findall(text.lower())
    korean = sum(bool(HANGUL.search(word)) for word in words)
    return "en" if korean <= len(words) - korean and not STOP_WORDS.isdisjoint(words) else "ko"


def phrase(name: Phrase, language: Language) -> str:
    """Return a sentence in a language.

    >>> phrase("refusal", "ko")
    '찾은 글에는 나와 있지 않습니다.'
    """
    english, korean = PHRASES[name]
    return korean if language == "ko" else english
