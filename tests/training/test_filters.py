"""Which of a teacher's texts are kept, and why the others are dropped."""

from __future__ import annotations

from typing import Any

import pytest

from gistrag.training.filters import SeenQuestions, cohesion, is_known, pair_flaw, parse, polish, polish_list, support

TOWER = "The tower was built by Adela Novak in 1931. It is 80 metres high and stands on a hill above the harbour."


@pytest.mark.parametrize(
    "text",
    [
        "Q: Who built it?\nA: Adela Novak",
        "q: Who built it?\n\na: Adela Novak",
        "Sure! Here it is.\n\n**Question:** Who built it?\n**Answer:** Adela Novak",
        "Question 1: Who built it? Answer: Adela Novak",
        "- Q: Who built it?\n- A: Adela Novak\n\nQ: And when?\nA: 1931",
        "Q: Who built it?\nA: Adela Novak\nA: Adela\nA: Novak",
        'Of course:\n```json\n{"question": "Who built it?", "answer": "Adela Novak"}\n```',
        '[{"question": "Who built it?", "answer": "Adela Novak"}, {"question": "When?", "answer": "1931"}]',
    ],
)
def test_a_pair_is_found(text: str) -> None:
    """In lines or JSON, with whatever stands around it; of several the first."""
    assert parse(text) == ("Who built it?", "Adela Novak")


@pytest.mark.parametrize(
    "text",
    ["", "I am sorry.", "Q: Who built it?", "A: Adela Novak", "Q:\nA: Adela", "Q: Who built it?\nA:",
     '{"question": "Who built it?"}', '{"question": "Who built it?", "answer": ', "[]", "{}"],
)  # fmt: skip
def test_what_is_no_pair_is_none(text: str) -> None:
    """Half a pair is none."""
    assert parse(text) is None


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("Adela Novak", 1.0),
        ("the towers", 1.0),  # endings are forgiven
        ("80 metres", 1.0),
        ("81 metres", 0.0),
        ("in 1931, by Novak", 1.0),
        ("a castle", 0.0),
        ("a tower and a castle", 0.5),
        ("the hill where Tomas Brandt lived", 0.0),  # a name it does not hold
        ("yes", 0.0),
        ("It is.", 0.0),  # says nothing
    ],
)
def test_support_is_the_share_of_words_held(answer: str, share: float) -> None:
    """Content words count; a number or name that the passage lacks ends it."""
    assert support(answer, TOWER) == share


GOOD = "The tower was built by Adela Novak in 1931, and it stands on a hill above the harbour."


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        (GOOD, GOOD, ""),
        (f"{GOOD} It is 80 metres high.", f"{GOOD} It is 80 metres high.", ""),
        (f"{GOOD} It is 90 metres high.", GOOD, "unsupported"),
        (f"{GOOD} It was painted green by sailors from abroad.", GOOD, "unsupported"),
        ("Adela Novak is 80 metres high and stands in the tower of the harbour of 1931.", "", "unsupported"),
        (f"{GOOD} It is (80 metres high.", GOOD, "unfinished"),
        (f'{GOOD} It is "80 metres high.', GOOD, "unfinished"),
        (f"{GOOD} It stands there.", GOOD, "short"),
        ("The tower that is so high is above the harbour, high on the hill.", "", "short"),
        ("The passage does not say that the tower was built by Adela Novak in 1931.", "", "unsupported"),
        (f"{GOOD} It is 80 metres high and it is 80 metres high.", GOOD, "repetitive"),
        (f"{GOOD} {GOOD}", GOOD, "repetitive"),
        (f"{GOOD} The tower was built by Adela", GOOD, "unfinished"),
        ("It is 80 metres high.", "", "short"),
        ("The tower was built by", "", "unfinished"),
        ("The passage gives an overview of the information.", "", "short"),
        (f"Passage: {GOOD}", "", "unsupported"),
        ("", "", "short"),
    ],
)
def test_a_long_answer_is_kept_as_far_as_it_is_good(text: str, kept: str, reason: str) -> None:
    """Up to the first sentence that is unfinished, not held by the passage, or was said before."""
    assert polish(text, TOWER) == (kept, reason)


def test_a_heading_need_not_be_repeated() -> None:
    """A passage says nothing of what stands above it, an answer may."""
    text = "The Lighthouse of Varn was built by Adela Novak in 1931 and stands on a hill above the harbour."

    assert polish(text, TOWER) == ("", "unsupported")
    assert polish(text, TOWER, "Lighthouse of Varn") == (text, "")


def test_words_put_together_anew_are_not_held() -> None:
    """Neighbouring words must stand in one sentence of the passage, or in what it is about."""
    text = "The tower is red. The mill by the river is old."

    assert cohesion("The mill is an old one by a river.", text) == 1.0
    assert cohesion("The red mill is old.", text) == 0.5
    assert cohesion("An old tower", text) == 0.0
    assert cohesion("A red farm", text, "The farm") == 1.0
    assert cohesion("Old", text) == 0.0


def test_a_list_is_kept_item_by_item() -> None:
    """With the line it begins with; a single item is no list."""
    items = ["1. The tower was built by Adela Novak in 1931.", "2. It is 80 metres high.", "3. It stands on a"]
    head = "The main points are:\n\n"

    assert (head + "\n".join(items[:2]), "unfinished") == polish(head + "\n".join(items), TOWER)
    assert polish(f"{head}1. {GOOD}\n2. It belongs to the Smiths of the harbour.", TOWER) == ("", "unsupported")
    assert polish("The main points are:", TOWER) == ("", "short")


def test_abbreviations_end_no_sentence() -> None:
    """A text is not cut in the middle of a name."""
    text = "Near St. John's, on a hill above the harbour, Adela Novak built a tower that is 80 metres high."

    assert polish(text, text) == (text, "")


@pytest.mark.parametrize(
    ("kind", "question", "answer", "flaw"),
    [
        ("detail", "Who built the tower?", "Adela Novak", ""),
        ("detail", "Who built the tower?", "Tomas Brandt", "unsupported"),
        ("detail", "Who does the passage name?", "Adela Novak", "unclear"),
        ("detail", "Who built the tower?", "The answer is: Adela Novak", "unclear"),
        ("theme", "What is the tower?", "A high one above the harbour.", ""),
        ("theme", "What is the tower?", "A high one above the", "unfinished"),
        ("theme", "What is the tower?", "The tower on the hill, the tower on the hill.", "repetitive"),
        ("inference", "Why is it easy to see?", "It is high, and stands on a hill.", ""),
        ("inference", "Why is it easy to see?", "Sailors painted every wall in bright colours.", "unsupported"),
    ],
)
def test_flaws_of_a_pair(kind: str, question: str, answer: str, flaw: str) -> None:
    """A question stands for itself; an answer is finished, says a thing once, and is held by the passage."""
    assert pair_flaw(kind, question, answer, TOWER) == flaw


@pytest.mark.parametrize(
    ("said", "known"), [("Adela Novak", True), ("It was the Adela Novak!", True), ("Adela", False), ("", False)]
)
def test_a_known_answer(said: str, known: bool) -> None:
    """An answer counts as known when it is or holds the right one."""
    assert is_known("detail", said, "Adela Novak") == known


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("A water mill uses the flow of a river to grind grain into flour.", True),
        ("It is a mill by the river that grinds.", False),
        ("I have no idea what the passage is about.", False),
    ],
)
def test_a_known_sentence(said: str, known: bool) -> None:
    """A sentence is known in other words too, if most of them are the same."""
    assert is_known("theme", said, "A water mill uses the river's flow to grind grain into flour.") == known


def asked(question: str, *, kind: str = "detail", context: str = "c", source: str = "s") -> dict[str, Any]:
    """Return the part of a record that duplicates are told by."""
    return {"question": question, "kind": kind, "context": context, "source": source}


def test_the_same_question_is_asked_once() -> None:
    """In the same words anywhere, or nearly the same about one source."""
    questions = SeenQuestions()
    first = "Who built the old tower above the harbour of the town?"

    assert questions.is_new(asked(first))
    assert not questions.is_new(asked("who built the old tower above the harbour of a town", source="t"))
    assert not questions.is_new(asked("Who built the old tower above the harbour of that town?"))
    assert questions.is_new(asked("Who built the old tower above the harbour of that town?", source="t"))
    assert questions.is_new(asked("When was the tower built?"))


def test_tasks_and_planted_facts_repeat_about_other_passages() -> None:
    """Their few wordings are duplicates only about the same passage."""
    questions = SeenQuestions()

    for kind in ("long", "probe name"):
        assert questions.is_new(asked("Give a short summary.", kind=kind, context=f"{kind} a"))
        assert questions.is_new(asked("Give a short summary.", kind=kind, context=f"{kind} b"))
        assert not questions.is_new(asked("Give a short summary.", kind=kind, context=f"{kind} a"))


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        ("1. The mill is red.\n2. It has nine wheels.", "- The mill is red.\n- It has nine wheels.", ""),
        ("- red mill\n- nine wheels\n- it stands by the", "- red mill\n- nine wheels", "unfinished"),
        ("1. A red mill.\n2. A red mill.\n3. Nine wheels.", "- A red mill.\n- Nine wheels.", "repetitive"),
        ("1. A red mill.\n2. Ten wheels.\n3. Nine wheels.", "- A red mill.\n- Nine wheels.", "unsupported"),
        ("1. The mill is red.", "", "short"),
        ("The mill is red, with nine wheels.", "", "short"),
        ("1. The\n2. It\n3. of it.", "", "short"),
    ],
)  # fmt: skip
def test_a_list_keeps_the_items_that_its_passage_supports(text: str, kept: str, reason: str) -> None:
    """Items are told apart by their marks and written alike; one item is no list."""
    assert polish_list(text, "The red mill has nine wheels. It stands by the river.") == (kept, reason)


# Korean

RULES = (
    "한울정밀의 사무직은 오전 9시부터 일한다. 초과 근무는 하루 전까지 팀장의 승인을 받아야 한다. "
    "자기 차로 다니는 직원에게는 한 달에 8만 원을 지급한다. 선반 앞에서는 장갑을 끼지 않는다. "
    "장갑이 기계에 말려 들어갈 수 있기 때문이다. 안전 책임자는 제1공장의 윤도현 과장이다. "
    "소방 훈련은 5월과 11월에 한다. 야간 조의 식사는 무료이다."
)


@pytest.mark.parametrize(
    ("kind", "question", "answer"),
    [
        ("detail", "한울정밀에서 자기 차로 다니는 직원은 한 달에 얼마를 받나요?", "8만 원"),
        ("detail", "제1공장의 안전 책임자는 누구인가요?", "윤도현 과장입니다"),
        ("detail", "한울정밀은 소방 훈련을 언제 하나요?", "5월과 11월"),
        ("detail", "초과 근무는 누구의 승인을 받아야 하나요?", "팀장"),
        ("detail", "한울정밀 사무직은 몇 시부터 일하나요?", "오전 9시부터 일합니다."),
        ("inference", "왜 선반 앞에서 장갑을 끼면 안 되나요?", "장갑이 기계에 말려 들어갈 수 있기 때문입니다."),
        ("inference", "초과 근무를 하려면 무엇을 먼저 해야 하나요?", "하루 전까지 팀장에게 승인을 받아야 합니다."),
        ("theme", "한울정밀의 규칙은 무엇을 정하나요?", "직원의 근무와 안전, 식사와 훈련을 정합니다."),
    ],
)
def test_good_korean_pairs_are_kept(kind: str, question: str, answer: str) -> None:
    """Another particle, another form of a verb and another level of politeness are no faults."""
    assert pair_flaw(kind, question, answer, RULES) == ""


@pytest.mark.parametrize(
    ("kind", "question", "answer", "reason"),
    [
        ("detail", "한울정밀에서 자기 차로 다니는 직원은 얼마를 받나요?", "9만 원", "unsupported"),
        ("detail", "제1공장의 안전 책임자는 누구인가요?", "윤도영 과장", "unsupported"),
        ("detail", "한울정밀의 본사는 어디에 있나요?", "창원", "unsupported"),
        ("detail", "이 글에서 소방 훈련은 언제 하나요?", "5월과 11월", "unclear"),
        ("detail", "소방 훈련은 언제 하나요?", "답변: 5월과 11월", "unclear"),
        ("inference", "왜 장갑을 끼면 안 되나요?", "장갑이 기계에 말려 들어갈 수", "unfinished"),
        ("inference", "왜 승인을 받나요?", "본사의 예산이 모자라서 사장이 비용을 아끼려고 합니다.", "unsupported"),
        ("theme", "규칙은 무엇을 정하나요?", "기숙사와 급여, 승진과 해외 출장을 정합니다.", "unsupported"),
    ],
)
def test_bad_korean_pairs_are_dropped(kind: str, question: str, answer: str, reason: str) -> None:
    """Another number, name or place, a question that points at the text, half a sentence, invented reasons."""
    assert pair_flaw(kind, question, answer, RULES) == reason


@pytest.mark.parametrize(
    "text",
    [
        "질문: 식사는 얼마인가요?\n답변: 무료",
        "**질문 1**: 식사는 얼마인가요?\n**정답**: 무료",
        "문제: 식사는 얼마인가요? 답: 무료",
    ],
)
def test_a_korean_pair_is_found(text: str) -> None:
    """With the labels that teachers write."""
    assert parse(text) == ("식사는 얼마인가요?", "무료")


def test_a_long_korean_answer_is_kept_as_far_as_it_is_good() -> None:
    """Its sentences end like any others."""
    good = "사무직은 오전 9시부터 일합니다. 초과 근무는 팀장의 승인을 받아야 합니다."

    assert polish(good, RULES) == (good, "")
    assert polish(f"{good} 야간 조의 식사는 구내식당에서 4,000원입니다.", RULES) == (good, "unsupported")
    assert polish("야간 조의 식사는 무료입니다.", RULES) == ("", "short")
    assert polish_list("1. 야간 조의 식사는 무료.\n2. 소방 훈련은 5월과 11월.", RULES)[1] == ""
