"""Times are taken of answers that read their gists from files."""

from __future__ import annotations

from support.tiny_models import tiny_model

from gistrag.evaluation.arms import ARMS, arms
from gistrag.evaluation.cases import Case
from gistrag.evaluation.corpus import Passage
from gistrag.evaluation.speed import Stopwatch

PASSAGES = tuple(Passage(text, (), len(text)) for text in ("The crane eats frogs.", "The mill has two wheels."))


def test_arms_take_turns() -> None:
    """Every arm is measured as often as asked, in turn, with all that its first token took."""
    model = tiny_model()
    case = Case("questions", "0", "What eats the crane?", ("frogs",), PASSAGES, 4, PASSAGES)
    chosen = arms(ARMS, rates=(2,), placement="anchored", main_rate=2, has_adapter=False)

    with Stopwatch(model) as stopwatch:
        samples = list(stopwatch.samples({"question": [case]}, chosen, repeats=2))

    assert 2 * [arm.name for arm in chosen] == [sample["arm"] for sample in samples]
    assert {"question"} == {sample["context"] for sample in samples}
    for sample in samples:
        assert 0 <= sample["load_s"] < sample["ttft_s"]
        assert sample["decode_tokens_per_s"] > 0
        assert sample["peak_bytes"] > 1e6
    tokens = {sample["arm"]: sample["source_tokens"] for sample in samples}
    assert 0 == tokens["none"]
    assert tokens["text"] == tokens["gist 2"] == tokens["hybrid 2"] > 0


def test_a_context_that_does_not_fit_is_not_timed() -> None:
    """Text beyond the window is left out, gists that fit packed are measured."""
    model = tiny_model()
    many = tuple(Passage(f"{number} {PASSAGES[1].text * 2}", (), 50) for number in range(18))
    case = Case("passkey", "0", "What has the mill?", ("wheels",), many, 4)
    chosen = arms(("text", "gist"), rates=(4,), placement="anchored", main_rate=4, has_adapter=False)

    with Stopwatch(model) as stopwatch:
        samples = list(stopwatch.samples({"900 tokens": [case]}, chosen, repeats=1))

    assert ["gist 4"] == [sample["arm"] for sample in samples]
