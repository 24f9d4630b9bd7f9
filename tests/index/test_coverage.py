"""What a build says where reader or embedder hardly know the script of the documents."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tiny_models import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from gistrag.engine import Engine
from gistrag.index.coverage import Sample
from gistrag.model.suggestions import BY_HUB_ID, suggested
from gistrag.rag import GistRAG

KOREAN = "한울정밀의 사무직은 오전 아홉 시부터 오후 여섯 시까지 일하고, 점심시간은 한 시간이다. " * 20
ENGLISH = "Staff work from nine to six, with an hour for lunch. " * 20


def words_tokenizer() -> Tokenizer:
    """Return a tokenizer for which every word is one token, so it knows every language."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def verdicts(text: str, tokenizer: Tokenizer, *, unknown: float = 0.0) -> list[str]:
    sample = Sample()
    sample.add(text)
    return sample.verdicts("tiny", tokenizer, lambda words: unknown)


def test_a_reader_that_spells_a_script_in_bytes_is_named() -> None:
    """The sentence says how many tokens it takes and names readers that know the script, with size and license."""
    (said,) = verdicts(KOREAN, byte_tokenizer().backend_tokenizer)

    assert said.startswith("Hangul, 100% of the letters: tiny takes 3.")
    assert "gemma3-270m (268 million parameters, Gemma Terms of Use)" in said
    assert "Qwen/Qwen2.5-0.5B-Instruct (494 million parameters, Apache-2.0)" in said


def test_a_reader_that_knows_the_script_is_not_spoken_of() -> None:
    """One token a word is few in any script."""
    assert verdicts(f"{KOREAN} {ENGLISH}", words_tokenizer()) == []


def test_an_embedder_that_does_not_know_the_words_is_named() -> None:
    """With the share of words it does not know."""
    (said,) = verdicts(KOREAN, words_tokenizer(), unknown=0.24)

    assert "the embedder does not know 24% of its words" in said
    assert "--model" not in said


@pytest.mark.parametrize("text", ["국나래 " * 20, ENGLISH * 3 + "국나래 " * 50, ""])
def test_a_few_words_are_not_spoken_of(text: str) -> None:
    """Some names in another script make no difference to a folder."""
    assert [said for said in verdicts(text, byte_tokenizer().backend_tokenizer) if "Hangul" in said] == []


def test_scripts_come_by_their_share() -> None:
    """Each gets a sentence of its own, the most frequent one first."""
    said = verdicts(
        "Насосная открывается каждое утро. " * 20 + "水泵房每天早上八点开门。" * 25, byte_tokenizer().backend_tokenizer
    )

    assert [one.split(",")[0] for one in said] == ["Cyrillic", "Han"]


def test_a_build_says_it_once(tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """As a warning and in its report; a build that reads nothing new says nothing."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "rules.md").write_text(KOREAN, "utf-8")
    caplog.set_level(logging.WARNING, logger="gistrag")

    reports: list[Sequence[str]] = []
    for _ in range(2):
        with GistRAG.from_folder(tmp_path / "docs", index=tmp_path / "index", engine=engine, gists="on demand") as rag:
            assert rag.report is not None
            reports.append(rag.report.coverage)
    told = [record.getMessage() for record in caplog.records if "Hangul" in record.getMessage()]

    assert [len(report) for report in reports] == [1, 0]
    assert told == reports[0]


@pytest.mark.model
def test_the_default_models_know_english_only() -> None:
    """The default reader and the English embedder know English, and neither knows Korean."""
    from gistrag.index.embedder import Embedder
    from gistrag.model.gguf import converted
    from gistrag.model.hub import find

    tokenizer = Tokenizer.from_file(str(converted(find("smollm2-135m-instruct").path) / "tokenizer.json"))
    embedder = Embedder(find("all-minilm-l6-v2").path)
    for text, count in ((ENGLISH, 0), (KOREAN, 1)):
        sample = Sample()
        sample.add(text)
        said = sample.verdicts("smollm2-135m-instruct", tokenizer, embedder.unknown_share)
        assert len(said) == count
    assert "tokens a character" in said[0]
    assert "the embedder does not know" in said[0]


def test_a_reader_is_not_suggested_in_place_of_itself() -> None:
    """And each suggestion has the shape its parameters follow from."""
    assert "gemma3-270m" not in suggested("gemma3-270m")
    assert {one.hub_id for one in BY_HUB_ID} >= {"Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen2.5-1.5B-Instruct"}
    assert all(one.license == "Apache-2.0" and "Korean" in one.languages for one in BY_HUB_ID)
