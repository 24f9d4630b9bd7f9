"""Scores against values worked out by hand, and intervals against samples whose spread is known."""

from __future__ import annotations

import math
import random
import re

import pytest

from gistrag.model.prompt import REFUSAL
from gistrag.qa.metrics import (
    contains,
    evidence_covered,
    exact_match,
    f1,
    hallucinated,
    is_refusal,
    mean,
    normalized,
    ratio,
    retention,
    rouge_l,
)

# Answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an apple, a pear and the  plum", "apple pear and plum"),
        ("69,197", "69197"),
        ("8.0 Ms", "80 ms"),
        ("Theatre", "theatre"),
        (" \n the \t", ""),
    ],
)
def test_normalising_follows_squad(text: str, expected: str) -> None:
    """Lower case, no punctuation, no articles, single spaces."""
    assert normalized(text) == expected


def test_an_exact_match_is_with_any_answer() -> None:
    """One of several accepted answers is enough, and nothing may be left over."""
    answers = ["the Great Sichuan earthquake", "Wenchuan earthquake"]

    assert exact_match("Great Sichuan Earthquake.", answers)
    assert exact_match("The Wenchuan earthquake", answers)
    assert not exact_match("the earthquake", answers)
    assert not exact_match("the earthquake", [])


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        ("Paris", ["Paris"], 1.0),
        ("in Paris", ["Paris"], 2 / 3),  # 1 of 2 words right, 1 of 1 found
        ("Paris Paris", ["Paris"], 2 / 3),  # a word counts as often as it stands in both
        ("the quick brown fox", ["a slow brown fox"], 2 / 3),  # 2 of 3 each way
        ("red green", ["red", "red green blue", "green red"], 1.0),  # order does not count, the best answer does
        ("London", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("the", ["a"], 1.0),  # both are nothing
        ("Paris", [], 0.0),
    ],
)
def test_f1_is_that_of_the_best_answer(said: str, answers: list[str], expected: float) -> None:
    """F1 is the harmonic mean of the shares of common words."""
    assert f1(said, answers) == pytest.approx(expected)


def test_containing_is_by_whole_words() -> None:
    """An answer inside a sentence counts, one inside a word or number does not."""
    assert contains("The answer is: the Wenchuan earthquake.", ["Wenchuan earthquake"])
    assert not contains("in 12008", ["2008"])
    assert not contains("anything", ["the"])  # an answer of nothing is in everything


@pytest.mark.parametrize(
    "said",
    [
        REFUSAL,
        "The passage does not mention the name of the ship.",
        "The text doesn't provide this information.",
        "The provided passages do not explicitly state it.",
        "I don't know.",
        "It is not mentioned in the passages.",
        "There is no information about that.",
    ],
)
def test_refusals_are_known(said: str) -> None:
    """The refusal of an adapter is one, and so are the usual ones of base models."""
    assert is_refusal(said)


@pytest.mark.parametrize("said", ["", "No.", "The passage was written in 1990.", "He did not say a word.", "a passage"])
def test_answers_are_no_refusals(said: str) -> None:
    """An answer with the same words in it is an answer."""
    assert not is_refusal(said)


def test_a_hallucination_is_a_claim_that_no_passage_makes() -> None:
    """Words of a passage, a refusal and silence are none."""
    passages = ["The epicenter was 80 kilometres from Chengdu.", "It was felt in Beijing."]

    assert not hallucinated("80 kilometres", passages)
    assert not hallucinated("in Beijing!", passages)
    assert not hallucinated(REFUSAL, passages)
    assert not hallucinated(" ", passages)
    assert hallucinated("Shanghai", passages)
    assert hallucinated("8", passages)
    assert hallucinated("Chengdu. It was felt", passages)  # no single passage says it


# Intervals


def test_a_mean_has_the_interval_of_its_standard_error() -> None:
    """For a share of a half among 400 the interval is 1.96 standard errors to each side."""
    estimate = mean([0.0, 1.0] * 200)

    assert estimate is not None
    assert estimate.value == 0.5
    assert estimate.count == 400
    error = 1.96 * math.sqrt(0.25 / 400)
    assert 0.5 - error == pytest.approx(estimate.low, abs=0.008)  # a thousand draws know a percentile to about that
    assert 0.5 + error == pytest.approx(estimate.high, abs=0.008)


def test_what_never_varies_has_no_width() -> None:
    """Equal values have an interval of one point, and so has a ratio that every question shares."""
    assert _bounds(mean([0.25] * 30)) == (0.25, 0.25, 0.25)
    assert _bounds(ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])) == (0.5, 0.5, 0.5)


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    """The ratio of two arms that fail together is surer than either mean."""
    reference = [1.0] * 50 + [0.0] * 50
    arm = [0.9] * 50 + [0.0] * 50

    kept, alone = ratio(arm, reference), mean(arm)

    assert kept is not None
    assert alone is not None
    assert kept.value == pytest.approx(0.9)
    assert kept.high - kept.low < 0.01 < 0.1 < alone.high - alone.low


def test_a_seed_gives_the_same_interval_again() -> None:
    """Intervals are a function of values and seed."""
    values = [number / 7 % 1 for number in range(60)]

    assert mean(values, seed=1) == mean(values, seed=1)
    assert mean(values, seed=1) != mean(values, seed=2)


def test_no_values_have_no_estimate() -> None:
    """Nothing is not zero."""
    assert mean([]) is None
    assert ratio([1.0], [0.0]) is None


def test_a_ratio_needs_pairs() -> None:
    """Unpaired values are refused with both counts."""
    with pytest.raises(ValueError, match="got 1 and 2"):
        ratio([1.0, 0.0], [1.0])


def test_retention_counts_what_the_reference_gets_right() -> None:
    """Of three right answers two stay; what only the arm gets right does not count."""
    estimate = retention([True, True, True, False, False], [True, True, False, True, False])

    assert estimate is not None
    assert 2 / 3 == pytest.approx(estimate.value)
    assert 0 <= estimate.low < 2 / 3 < estimate.high <= 1


def test_retention_of_nothing_is_unknown() -> None:
    """A reference that gets nothing right cannot be kept to any share."""
    assert retention([False, False], [True, False]) is None
    assert retention([], []) is None


def _bounds(estimate: object) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("output", "answers", "score"),
    [
        ("The mill grinds wheat.", ["the mill grinds wheat"], 1.0),
        ("wheat grinds mill", ["the mill grinds wheat"], 1 / 3),
        ("w b c d", ["x", "b d"], 2 / 3),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
        ("x", [], 0.0),
    ],
)
def test_rouge_l_counts_words_in_order(output: str, answers: list[str], score: float) -> None:
    """The longest common subsequence with the answer that fits best."""
    assert rouge_l(output, answers) == pytest.approx(score)


def test_evidence_is_covered_by_its_words() -> None:
    """Stop words count for nothing, and of several people the one who is covered best counts."""
    evidence = ["The mill of the valley is old.", "It grinds wheat.\nIt grinds rye."]

    assert evidence_covered("It grinds rye and wheat", evidence) == 1.0
    assert evidence_covered("the old mill", evidence) == pytest.approx(2 / 3)
    assert evidence_covered("the mill", []) == 0.0


# Korean


def squad(text: str) -> str:
    """Normalize as the published script of SQuAD 1.1 describes it, written anew: lower, marks, articles, spaces."""
    lowered = "".join(one for one in text.lower() if one not in set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
    return " ".join(word for word in re.sub(r"\b(?:a|an|the)\b", " ", lowered).split() if word)


def squad_f1(output: str, answer: str) -> float:
    """F1 of SQuAD 1.1 over bags of words."""
    said, wanted = squad(output).split(), squad(answer).split()
    if not said or not wanted:
        return float(said == wanted)
    left = list(wanted)
    same = sum(1 for word in said if word in left and (left.remove(word) or True))  # type: ignore[func-returns-value]
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


PIECES = (
    *("the", "The", "an", "A", "Theatre", "cat", "Cat's", "U.S.", "1,200", "80%", "naïve", "“quoted”", "—", "O'Neil"),
    *("x-ray", "$5.00", "(old)", "μm", "é", "  ", "\t", "\n", "Zürich", "25–30", "a", "it's", "½", "№ 5", "...", "I"),
    *("ß", "ﬁn", "İ", "Dž", "the-a", "an,the"),
)  # fmt: skip


def test_english_figures_are_those_of_squad() -> None:
    """On 4,000 drawn strings without Korean, whatever their marks and accents, the figures are the same."""
    drawn = random.Random(5)
    strings = [" ".join(drawn.choices(PIECES, k=drawn.randint(0, 6))) for _ in range(4000)]
    pairs = list(zip(strings, [*strings[1:], ""], strict=True))

    assert [text for text in strings if normalized(text) != squad(text)] == []
    assert [pair for pair in pairs if f1(pair[0], [pair[1]]) != pytest.approx(squad_f1(*pair))] == []
    assert [pair for pair in pairs if exact_match(pair[0], [pair[1]]) != (squad(pair[0]) == squad(pair[1]))] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("『새봄』 도서관, 2016년!", "새봄 도서관 2016년"),
        ("８만 원", "8만 원"),
        ("\u1112\u1161\u11ab\u1100\u1173\u11af", "한글"),
        ("“연차”는 15일·반차", "연차는 15일반차"),
        ("API는 A", "api는 a"),
    ],
)
def test_korean_is_normalized_by_unicode(text: str, expected: str) -> None:
    """Marks of any script go, letters are composed, wide digits are digits; there are no articles."""
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    [
        ("8만 원", "8만 원", 1.0),
        ("8만원", "8만 원", 1.0),  # spaces do not count, as in KorQuAD
        ("8만 원을", "8만 원", 2 * 3 / 7),
        ("오순덕 선생님", "오순덕", 2 * 3 / 9),
        ("4417번", "4417", 2 * 4 / 9),
        ("열흘", "스무날", 0.0),
        ("15 days", "15일", 2 * 2 / 9),
    ],
)
def test_f1_of_korean_is_of_characters(said: str, answer: str, expected: float) -> None:
    """A right answer with a particle keeps most of its score, one with other characters has none."""
    assert f1(said, [answer]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("output", "answer", "expected"),
    [
        ("휴가는 15일입니다.", "15일", True),
        ("윤도현 과장에게 알립니다.", "윤도현 과장", True),
        ("115일입니다.", "15일", False),
        ("3만 원", "3", False),
        ("이것은 아닙니다", "이", False),
        ("다음 날", "다", False),
        ("창원에 있다", "창원", True),
    ],
)
def test_a_korean_answer_may_have_a_particle(output: str, answer: str, expected: bool) -> None:
    """But it is no part of a longer word or number."""
    assert contains(output, [answer]) == expected


@pytest.mark.parametrize(
    "said",
    [
        "찾은 글에는 나와 있지 않습니다.",
        "본문에는 그 이름이 언급되어 있지 않습니다.",
        "주어진 문서에는 명시되지 않았습니다.",
        "해당 내용은 본문에서 답을 찾을 수 없습니다.",
        "알 수 없습니다.",
        "잘 모르겠습니다.",
        "관련 정보가 없습니다.",
    ],
)
def test_korean_refusals_are_known(said: str) -> None:
    """That of the product, and the usual ones of base models."""
    assert is_refusal(said)


@pytest.mark.parametrize(
    "said",
    [
        "물이 나오지 않습니다.",
        "비밀번호는 관리자도 알 수 없습니다.",
        "벌금은 없다.",
        "월요일에는 문을 열지 않는다.",
        "구내식당은 없지만 분식집이 있습니다.",
        "없음",
    ],
)
def test_korean_answers_are_no_refusals(said: str) -> None:
    """A "no" or "not" in an answer is no refusal."""
    assert not is_refusal(said)


def test_a_korean_claim_of_no_passage_is_hallucinated() -> None:
    """Particles and "to be" change nothing."""
    passages = ["근속 1년이면 연차를 15일 준다."]

    assert not hallucinated("15일입니다.", passages)
    assert not hallucinated("연차", passages)
    assert not hallucinated("찾은 글에는 나와 있지 않습니다.", passages)
    assert hallucinated("16일입니다.", passages)
    assert rouge_l("물방아가 밀을", ["물방아는 밀을 빻는다"]) == pytest.approx(0.8)
    assert evidence_covered("물방아가 밀가루를 빻는다.", ["물방아는 밀가루만 빻는다."]) == 1.0
