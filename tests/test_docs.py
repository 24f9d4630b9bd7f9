"""The manual and the README say what the code does: names, arguments, options, links, exit codes.

Nothing is run and no model is loaded. Examples are parsed, and what they name is looked up.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import runpy
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pages import FENCE, MANUAL, PAGES, PROGRAM, ROOT, fences, parse, program_options, spans, spelt

from gistrag import Answer, GistRAG, Hit, Source, errors
from gistrag.cli import exit_codes, options

# what the examples call their values; every page keeps to these names
VALUES = {"rag": GistRAG, "notes": GistRAG, "manual": GistRAG, "answer": Answer, "source": Source, "hit": Hit}
CHECKED_CALLS = ("from_folder", "open", "query", "stream", "stream_from", "retrieve", "compress", "sync")

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


# Python


def names_of(kind: type) -> set[str]:
    """Return the attributes that a value of this type has, those set by its constructor included."""
    source = inspect.getsource(kind)
    return {*dir(kind), *typing.get_type_hints(kind), *re.findall(r"\bself\.([a-z]\w*)(?:: [^=\n]+)? = ", source)}


def type_of(node: ast.expr) -> Any:
    """Return the type of an expression as far as annotations tell, None where they do not."""
    match node:
        case ast.Name():
            return GistRAG if node.id == "GistRAG" else VALUES.get(node.id)
        case ast.Attribute():
            owner = type_of(node.value)
            return typing.get_type_hints(owner).get(node.attr) if inspect.isclass(owner) else None
        case ast.Subscript():
            return next(iter(typing.get_args(type_of(node.value))), None)
    return None


def wrong_names(tree: ast.AST) -> Iterator[str]:
    """Yield what a piece of Python names that does not exist."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "gistrag":
                home = importlib.import_module(module)
                yield from (alias.name for alias in node.names if not hasattr(home, alias.name))
            case ast.Attribute():
                owner = type_of(node.value)
                is_ours = inspect.isclass(owner) and owner.__module__.startswith("gistrag")
                if is_ours and node.attr not in names_of(owner):
                    yield ast.unparse(node)
            case ast.Call(func=ast.Attribute(attr=method) as called) if type_of(called.value) is GistRAG:
                if method in CHECKED_CALLS:
                    yield from (f"{method}({key.arg}=)" for key in node.keywords if key.arg not in arguments(method))


def arguments(method: str) -> set[str]:
    """Return the keyword arguments that a method of GistRAG takes."""
    return set(inspect.signature(getattr(GistRAG, method)).parameters)


@page
def test_python_names_what_exists(page: Path) -> None:
    """Every Python example compiles, and its imports, attributes and arguments are those of the library."""
    trees = [ast.parse(block) for block in fences(page, "python")]

    assert [name for tree in trees for name in wrong_names(tree)] == []


@page
def test_sentences_name_attributes_that_exist(page: Path) -> None:
    """`answer.usage.…` and the like in a sentence exist."""
    found = [re.match(rf"(?:{'|'.join(VALUES)}|GistRAG)(?:\.[a-z]\w*)+(?!\w)", span) for span in spans(page)]

    assert [name for match in found if match for name in wrong_names(ast.parse(match[0]))] == []


@pytest.mark.parametrize(
    "wrong",
    ["from gistrag import Rag", "rag.ask('a')", "answer.usage.slots", "answer.sources[0].file", "rag.query('a', k=3)",
     "GistRAG.from_folder('a', folder_index='b')", "hit.chunk.name", "GistRAG.open('a', rebuild=True)"],
)  # fmt: skip
def test_wrong_python_is_found(wrong: str) -> None:
    """A name that does not exist is noticed, so the tests above mean something."""
    assert len(list(wrong_names(ast.parse(wrong)))) == 1


# Command lines


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of every call of gistrag in the shell examples of a page, up to a pipe or redirection."""
    for line in "".join(fences(page, "bash", "console")).splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        stops = [at for at, word in enumerate(words) if set(word) <= set("<>|&;")]
        if words[:1] == ["gistrag"]:
            yield words[1 : stops[0] if stops else None]


def options_of(verb: str) -> set[str]:
    """Return the long options of a command."""
    return {option for parameter in PROGRAM.commands[verb].params for option in spelt(parameter)}


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to parse command lines in, with what they ask to exist; --quiet is taken back."""
    level = options.logger.level
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "notes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "questions.txt").touch()
    yield tmp_path
    options.logger.setLevel(level)


@page
@pytest.mark.usefixtures("shell")
def test_command_lines_parse(page: Path) -> None:
    """Every command line of an example has a verb, options and values that the program takes."""
    for words in command_lines(page):
        parse(words)


@pytest.mark.parametrize("wrong", ["build docs/ --fast", "query a --mode fast", "ask a", "build nowhere/"])
@pytest.mark.usefixtures("shell")
def test_wrong_command_lines_do_not_parse(wrong: str) -> None:
    """A verb, option or value that does not exist is noticed, so the test above means something."""
    with pytest.raises(Exception, match=r"fast|auto|ask|nowhere"):
        parse(wrong.split())


@page
def test_sentences_name_options_that_exist(page: Path) -> None:
    """`gistrag build --rebuild` in a sentence, and a bare `--rebuild`, exist."""
    of_no_verb = {"--help", "--no-deps", *program_options()}  # the second is of pip
    of_any_verb = set().union(*map(options_of, PROGRAM.commands))
    for span in spans(page):
        words = span.split()
        verb = words[1] if words[0] == "gistrag" and len(words) > 1 and words[1] in PROGRAM.commands else None
        if verb or words[0].startswith("--"):
            named = set(re.findall(r"--[a-z][a-z-]*", span)) - of_no_verb
            assert named <= (options_of(verb) if verb else of_any_verb), span


@pytest.mark.parametrize("verb", sorted(PROGRAM.commands))
def test_every_option_is_described(verb: str) -> None:
    """The page of the command line names every option of a command, in its section or among the shared ones."""
    sections = (ROOT / "docs" / "command-line.md").read_text("utf-8").split("\n## ")
    described = "".join(
        one for one in sections if one.startswith((f"gistrag {verb}\n", "Options that the commands share"))
    )

    assert options_of(verb) - set(re.findall(r"`(--[a-z-]+)", described)) - {"--help"} == set()


@pytest.mark.parametrize("verb", sorted(PROGRAM.commands))
def test_every_command_explains_itself(verb: str) -> None:
    """The help of a command says what it does, what every option means, and ends with examples of its own."""
    entry = PROGRAM.commands[verb]

    assert entry.help
    assert [parameter.name for parameter in entry.params if not parameter.help] == []
    assert f"gistrag {verb}" in (entry.epilog or "")


# Exit codes


def all_errors(base: type[errors.GistRAGError] = errors.GistRAGError) -> Iterator[type[errors.GistRAGError]]:
    """Yield every error of the library below *base*."""
    for kind in base.__subclasses__():
        yield kind
        yield from all_errors(kind)


def test_exit_codes_are_listed() -> None:
    """The table of exit codes has each code once and no other."""
    table = (ROOT / "docs" / "command-line.md").read_text("utf-8").partition("## Exit codes")[2]
    found = [int(code) for code in re.findall(r"^\| (\d+) ", table, re.MULTILINE)]

    by_design = {0, 1, exit_codes.PARTIAL, exit_codes.INTERRUPTED, exit_codes.READER_GONE}
    assert found == sorted(by_design | {kind.exit_code for kind in all_errors()})


def test_every_error_has_a_section() -> None:
    """Troubleshooting has a section for each error, with its exit code."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    found = set(re.findall(r"^## (\w+Error), exit code (\d+)$", text, re.MULTILINE))

    assert found == {(kind.__name__, str(kind.exit_code)) for kind in all_errors()}


# Links, the tree, the questions


@page
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is to a file that exists."""
    links = re.findall(r"\]\(([^)\s#]+)", FENCE.sub("", page.read_text("utf-8")))

    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_page_is_in_the_contents() -> None:
    """The first page of the manual links to all others."""
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text("utf-8")))

    assert linked == {path.name for path in MANUAL} - {"index.md"}


def test_the_glossary_is_in_alphabetical_order() -> None:
    """The words of the glossary follow the alphabet, with `_` and `-` read as spaces."""
    words = re.findall(r"^- \*\*(.+?)\*\*: ", (ROOT / "docs" / "glossary.md").read_text("utf-8"), re.MULTILINE)

    assert len(words) > 50
    assert words == sorted(words, key=lambda word: re.sub("[_-]", " ", word.casefold()))


def rooms_in_the_tree() -> set[str]:
    """Return the folders that the tree in the README names inside of `gistrag/`."""
    (tree,) = (block for block in fences(ROOT / "README.md", "") if block.startswith("gistrag/\n"))
    inside = tree.partition("\nintegrations/")[0].splitlines()[1:]
    return set(re.findall(r"(?:^  |(?<=\s))(\w+)/(?=\s)", "\n".join(inside), re.MULTILINE))


def test_the_tree_lists_every_room() -> None:
    """The tree in the README names every folder of the package, and no other."""
    rooms = {path.name for path in (ROOT / "gistrag").iterdir() if path.is_dir() and path.name != "__pycache__"}

    assert rooms_in_the_tree() == rooms


def test_the_picture_names_modules_that_exist() -> None:
    """Every module in the picture of the README stands where the picture says."""
    (picture,) = (block for block in fences(ROOT / "README.md", "") if block.startswith("build "))
    named = re.findall(r"\w+/\w+\.py", picture)

    assert "documents/readers.py" in named
    assert [name for name in named if not (ROOT / "gistrag" / name).is_file()] == []


def test_questions_have_their_answer_in_the_manual() -> None:
    """A hundred different questions, each with an answer that stands in its document."""
    lines = (ROOT / "tests" / "data" / "questions.jsonl").read_text("utf-8").splitlines()
    asked = [json.loads(line) for line in lines]

    assert len({one["question"] for one in asked}) == len(asked) >= 100
    texts = {path.name: " ".join(path.read_text("utf-8").lower().split()) for path in MANUAL}
    assert [one for one in asked if one["answers"][0].lower() not in texts[one["document"]]] == []


# Figures


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """The program that makes the tables, as a dictionary of its names."""
    return runpy.run_path(str(ROOT / "notebooks" / "bench" / "results.py"))


@pytest.mark.parametrize("name", ["docs/performance.md", "gistrag/adapters/smollm2-135m-instruct/README.md"])
def test_tables_show_what_was_measured(results: dict[str, Any], name: str) -> None:
    """The tables of figures are those that `notebooks/bench/results.py` makes of the summary that is kept."""
    page, summary = (ROOT / name).read_text("utf-8"), json.loads(results["SUMMARY"].read_text("utf-8"))

    assert name in results["PAGES"]
    assert "<!-- table: questions -->\n\n| " in page
    assert page == results["with_tables"](page, summary)


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_readme_shows_what_was_measured(results: dict[str, Any], name: str) -> None:
    """The F1 of text and of gists in the README are those of the summary that is kept."""
    summary = json.loads(results["SUMMARY"].read_text("utf-8"))
    _, rows = results["tables"](summary)["questions"]
    f1 = {arm: figure for arm, _, figure, *_ in rows}

    assert f"| {f1['**text**']} | {f1['gists of 4 tokens']} |" in (ROOT / name).read_text("utf-8")
