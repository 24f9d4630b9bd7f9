"""What a teacher is asked to write, in the language of the passage: English or Korean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gistrag.qa.phrases import Language


@dataclass(frozen=True, kw_only=True)
class Wordings:
    """Requests in one language.

    Attributes:
        details: what a question may ask for; tasks, rules: of pairs, by kind; clear: another rule of theirs.
        form: how a pair is written; begin: the first words of one.
        long: tasks of long answers; topical, topical_rules: of lists and summaries about a topic.
        no_topic: what the topic is called where no heading tells it.
    """

    details: tuple[str, ...]
    tasks: Mapping[str, str]
    form: str
    rules: Mapping[str, str]
    clear: str
    begin: str
    long: tuple[str, ...]
    topical: Mapping[str, tuple[str, ...]]
    topical_rules: Mapping[str, str]
    no_topic: str


ENGLISH = Wordings(
    details=(
        "a person, a group or an organisation it names",
        "a date, a year or a number it gives",
        "a place it names",
        "a thing or a term it names",
        "what something is for, or why it was done",
    ),
    tasks={
        "detail": "Write a question about {detail}, and the answer.",
        "theme": "Write a question about the main idea of the passage, and the answer.",
        "inference": "Write a question that asks for a reason or a consequence, and the answer.",
    },
    form=" Begin with Q: and A:",
    rules={
        "detail": "The answer is a few words copied from the passage.",
        "theme": "The answer is one or two sentences that hold for the passage as a whole.",
        "inference": "The answer is one or two sentences, and takes two facts of the passage put together.",
    },
    clear="The question names what it is about, so that it can be understood by someone without the passage.",
    begin="Q:",
    long=(
        "Summarise the passage in two sentences.",
        "What are the most important facts in the passage?",
        "Explain in simple words what the passage says.",
        "What is the passage about, and why does it matter?",
        "Give a short summary of the passage.",
        "List the main points of the passage.",
        "Describe what the passage tells us.",
        "What does the passage say, and which details does it give?",
        "Explain the passage to a newcomer.",
        "Write a short paragraph about the topic of the passage.",
        "Tell me what the passage says, with its names and numbers.",
        "Give me the key facts of the passage as a list.",
    ),
    topical={
        "list": (
            "List the most important facts about {}.",
            "What are the main points about {}? Answer with a list.",
            "Name the things that are said about {}, one a line.",
            "Give me a list of key facts about {}.",
            "Which points should I know about {}?",
        ),
        "summary": (
            "Summarize what is said about {}.",
            "What is {} about? Answer in two or three sentences.",
            "Give a short summary of {}.",
            "Describe {} in a few sentences.",
            "Tell me about {}.",
        ),
    },
    topical_rules={
        "list": "Write three to six items, each on a line of its own that begins with a hyphen, with names and numbers "
        "copied from the passage. Write nothing else.",
        "summary": "Write two or three sentences that hold for the passage as a whole.",
    },
    no_topic="the passage",
)
KOREAN = Wordings(
    details=(
        "글에 나오는 사람이나 모임, 회사",
        "글에 나오는 날짜나 해, 숫자",
        "글에 나오는 장소",
        "글에 나오는 물건이나 말",
        "무엇의 쓰임이나 까닭",
    ),
    tasks={
        "detail": "다음을 묻는 질문 하나와 답변을 쓰세요: {detail}.",
        "theme": "글의 중심 내용을 묻는 질문 하나와 답변을 쓰세요.",
        "inference": "까닭이나 결과를 묻는 질문 하나와 답변을 쓰세요.",
    },
    form=" 질문: 과 답변: 으로 시작하세요.",
    rules={
        "detail": "답변은 글에서 그대로 옮긴 몇 낱말입니다.",
        "theme": "답변은 글 전체에 맞는 한두 문장입니다.",
        "inference": "답변은 글의 사실 두 가지를 이어서 쓴 한두 문장입니다.",
    },
    clear="글을 보지 않은 사람도 알 수 있도록 무엇에 관한 질문인지 밝히세요.",
    begin="질문:",
    long=(
        "글을 두 문장으로 요약하세요.",
        "글에서 가장 중요한 사실은 무엇인가요?",
        "글의 내용을 쉬운 말로 설명하세요.",
        "무엇에 관한 글이고, 왜 중요한가요?",
        "글을 짧게 간추리세요.",
        "글의 요점을 적으세요.",
        "글이 알려 주는 것을 이름과 숫자까지 말하세요.",
        "글의 주제를 한 문단으로 쓰세요.",
    ),
    topical={
        "list": (
            "{}에 관한 가장 중요한 사실을 목록으로 적으세요.",
            "{}의 요점은 무엇인가요? 목록으로 답하세요.",
            "{}에 관해 알아야 할 것을 한 줄에 하나씩 쓰세요.",
        ),
        "summary": (
            "{}에 관한 내용을 요약하세요.",
            "{}은(는) 무엇에 관한 것인가요? 두세 문장으로 답하세요.",
            "{}을(를) 짧게 간추리세요.",
        ),
    },
    topical_rules={
        "list": "항목을 셋에서 여섯 개 쓰세요. 항목마다 줄을 바꾸고 붙임표로 시작하며, "
        "이름과 숫자는 글에서 그대로 옮기세요. 다른 것은 쓰지 마세요.",
        "summary": "글 전체에 맞는 두세 문장을 쓰세요.",
    },
    no_topic="글",
)
WORDINGS: Mapping[Language, Wordings] = {"en": ENGLISH, "ko": KOREAN}
