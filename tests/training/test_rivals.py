"""Questions beside passages that look like the answer: whose they are, and that they do not answer."""

from __future__ import annotations

from gistrag.qa.dataset import REFUSAL, Context, Task
from gistrag.training.rivals import rivals

ASKED = Context("The mill of Alder has nine wheels.", "Alder", (Task("How many wheels has the mill?", ("nine",)),))
ALIKE = Context("The mill of Birch grinds wheat with wheels.", "Birch")
ANSWERS = Context("The mill has wheels, nine in all.", "Cedar")
OTHER = Context("The port closes at six.", "Dogwood")


def test_a_rival_is_alike_and_does_not_answer() -> None:
    """The passage with most rare words of the question, of another article and without the answer, is to be refused."""
    found = rivals([ASKED, ALIKE, ANSWERS, OTHER], seed=0, share=1.0)

    (task,) = found[0].tasks
    assert [(one.text, one.article) for one in found] == [(ALIKE.text, "Birch")]
    assert task == Task("How many wheels has the mill?", (REFUSAL,), "refusal")


def test_one_article_has_no_rivals() -> None:
    """Every passage of it may answer."""
    assert rivals([ASKED, Context("The mill has more wheels.", "Alder")], seed=0, share=1.0) == []


def test_only_questions_with_short_answers_get_rivals() -> None:
    """A task to summarize has no passage that does not answer it."""
    long = Context(ASKED.text, "Alder", (Task("Summarize the mill with wheels.", ("It has wheels.",), "summary"),))

    assert rivals([long, ALIKE], seed=0, share=1.0) == []
