"""Questions about a whole document, such as "What is this about?" or "Summarize the handbook", and which it is.

Such a question is answered from the summary of a document (`gistrag.documents.summary`). It names the document by its
title or file, or means the one that is in scope. A question about something *in* a document is none of these: "What
does the handbook say about leave?" asks for a detail.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gistrag.qa.stop_words import STOP_WORDS

QUESTION_CHARACTERS = 160

_OPENING = re.compile(
    r"(?:please|can you|could you|would you|ok|so|and|hi|hello|briefly"
    r"|in (?:short|brief|general|one sentence|a nutshell|a few (?:words|sentences))"
    r"|(?:(?:tell|explain to|show) (?:me|us)|explain)(?= (?:what|which|who)))\s+"
)
_CLOSING = re.compile(r"\s+(?:please|overall|in (?:short|brief|general|total|a nutshell)|altogether|roughly|exactly)$")
_SUMMARY = r"(?:summary|overview|outline|synopsis|abstract|tl ?dr|table of contents|main idea|gist)"
_POINTS = (
    r"(?:main |key |most important |central |essential |major )*"
    r"(?:points?|topics?|ideas?|messages?|contents?|subjects?|themes?|takeaways?|purpose|sections?|chapters?)"
)
_THINGS = r"(?:topics?|subjects?|sections?|chapters?|themes?|areas?|points|information|questions)"
_COVER = r"(?:cover|discuss|treat|contain|handle|deal with|address|explain|describe|include|answer|mention|have|list)"
_COVERED = r"(?:covered|discussed|treated|contained|handled|dealt with|addressed|explained|described|included|listed)"
_DOCUMENT = r"(?:this|the|that) (?:whole |entire )?(?:document|text|page|file)"
_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        r"what (?:is|s|are) (?:this|these)(?P<a> (?:document|text|page|file)s?)?",
        r"(?:what|which)(?: is| s| are| was)(?P<a> .*?)?(?: all| mainly| mostly)? about",
        r"what(?P<a> .*?)(?: is| was| are) (?:all |mainly )?about",
        rf"(?:what|which) {_THINGS} (?:does|do)(?P<a> .*?)? {_COVER}",
        rf"(?:what|which) {_THINGS} (?:are|is) (?:{_COVERED}|there)(?: here| (?:in|by)(?P<a> .*))?",
        rf"(?:what|which) {_THINGS} (?:are|is) in(?P<a> .*)",
        rf"what (?:is|s) {_COVERED}(?: here| (?:in|by)(?P<a> .*))?|what (?:is|s) in(?P<b> {_DOCUMENT})",
        r"what (?:does|do)(?P<a> .*?)? (?:cover|contain|discuss|deal with|talk about|describe|explain|say|regulate)",
        r"what (?:does|do)(?P<a> .*?)? (?:tell|teach) (?:me|us|you)|what (?:does|do)(?P<b> .*?)? consist of",
        r"(?:summari[sz]e|sum up|recap|outline)(?P<a> .*)?",
        rf"(?:give|write|make|show|get)(?: me| us)?(?: an?| the)?(?: \w+)? ?{_SUMMARY}(?: (?:of|for)(?P<a> .*))?",
        rf"(?:what is |what s |i (?:want|need|would like) )?(?:an? |the )?(?:short |brief |quick )?{_SUMMARY}"
        r"(?: (?:of|for)(?P<a> .*))?",
        rf"what(?: is| s| are) (?:the )?{_POINTS}(?: (?:of|in)(?P<a> .*))?",
        rf"(?:list|name|give|tell|show)(?: me| us)? (?:the )?{_POINTS}(?: (?:of|in)(?P<a> .*))?",
        r"who(?: is| s| are| was)(?P<a> .*?)? (?:written |meant |intended |made )?for",
        r"who(?: is| was)(?P<a> .*?) aimed at|for whom is(?P<b> .*?) written",
        r"who (?:should|would|has to|ought to|must) read(?P<a> .*)?",
        r"(?:who|what) is the (?:intended |target )?(?:audience|reader)(?: of(?P<a> .*))?",
        r"(?:what|which) (?:kind|sort|type) of (?:document|text|page|file) (?:is|are)(?P<a> .*)",
        r"what (?:will|can|would|do|could) (?:i|you|we) (?:find|learn|read|expect)(?: here| (?:in|from)(?P<a> .*))?",
        rf"(?:describe|explain|introduce|tell (?:me|us)(?: something)? about)(?P<a> {_DOCUMENT})",
    )
]
"""Whole questions without marks and capitals; the groups are what they call the document."""

_KOREAN = re.compile(
    r"요약|개요|간추려|(?:무슨|어떤) (?:내용|주제|문서|글|항목)|(?:주요|핵심|전체|중요한) (?:내용|주제|사항)"
    r"|(?:무엇|뭐|무얼)에? ?(?:관한|대한)|누구(?:를|을)? ?(?:위한|대상)|누가 읽"
)
_KOREAN_FRAME = re.compile(
    r"(?:이|그|저|본|해당) ?(?:문서|글|페이지|파일|자료)?\w{0,3}"
    r"|(?:문서|내용|전체|간단|무엇|뭐|주제|다루|설명|요약|개요|핵심|알려|말해|누구|대상)\w*"
    r"|(?:읽|항목|부탁|사항|간추려|글|하|한|해|것|건|있|되|알|위)\w*"
    r"|짧게|주세요|줘|줄래|무슨|어떤|어떻게|관한|대한|주요|누가|수|중요한|인가요|인지|좀"
)
_PARTICLE = re.compile(r"(?<=[\uac00-\ud7a3]{2})(?:은|는|을|를|이|가|의|에|에서|에는)$")
_PLAIN = """
    document documents text page pages file whole entire complete general overall all please few words sentence
    sentences here one two three thing things content contents md txt pdf html docx
"""
_GENERIC = STOP_WORDS | frozenset(_PLAIN.split())
_NAMED = """
    agreement article book contract guide handbook journal letter list log manual minutes notes paper policy recipe
    report rules statute readme diary faq
"""
_KINDS = frozenset(_NAMED.split())


_WHOLE_OPENING = re.compile(r"(?!\W*(?:how (?!would|do you (?:sum|describe))|when|where|why|is|are|was|does|do|did)\b)")
_STRONG = """
    abstract addressed addresses area areas audience contain contained contains content contents cover covered
    covering covers deal deals dealt describe described describes description discuss discussed discusses essence
    essentials explain explained explains gist handle handled handles headings highlights idea include included
    includes information introduce introduction main matters message nutshell outline outlines overview point points
    present presents reader readers readership recap regulate regulated regulates rundown section sections subject
    subjects sum summaries summarise summarised summarize summarized summary synopsis takeaway takeaways teach
    teaches theme themes tldr topic topics treat treated treats
"""
_WEAK = """
    aim aimed anybody away basically beginner brief briefly chapter chapters find give important info intended just
    key kind know learn line lines list looking mainly major make meant mention mentions most name need needs paper
    paragraph part parts people person picture piece purpose quick quickly read reading roughly say says short
    shortly show simple simply somebody someone sort suited supposed take talk talks tell tells type up useful write
    written
"""
_SAID, _MAYBE = frozenset(_STRONG.split()), frozenset(_WEAK.split())


def named_in(question: str) -> str | None:
    """Return what a question about a whole document calls it, ``""`` for "this document"; None for any other question.

    >>> named_in("What is this page about?"), named_in("Summarize the staff rules."), named_in("Who holds the lock?")
    ('', 'staff rules', None)
    """
    if len(question) > QUESTION_CHARACTERS:
        return None
    plain = " ".join(re.findall(r"\w+", question.lower()))
    if re.search(r"[\uac00-\ud7a3]", plain):
        words = [word for word in plain.split() if not _KOREAN_FRAME.fullmatch(word)]
        return " ".join(_PARTICLE.sub("", word) for word in words) if _KOREAN.search(plain) else None
    while (shorter := _CLOSING.sub("", re.sub(rf"^(?:{_OPENING.pattern})", "", plain))) != plain:
        plain = shorter
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(plain):
            named = " ".join(part for part in match.groupdict().values() if part)
            return " ".join(word for word in named.split() if word not in _GENERIC)
    return None


def document_named(name: str, titles: Mapping[str, str]) -> str | None:
    """Return the path of the document that a name means, None where none or several fit.

    Args:
        name: words, as `named_in` returns them.
        titles: of the documents, by their paths.

    >>> document_named("staff handbook", {"a/staff.md": "Staff handbook", "fire.md": "Fire"})
    'a/staff.md'
    """
    words = _stems(name)
    fits: dict[str, float] = {}
    for path, title in titles.items():
        known = _stems(f"{title} {path}")
        if words and (words <= known or (words - _KINDS and words - _KINDS <= known)):
            fits[path] = len(words & known) + len(words & _stems(title)) / (1 + len(_stems(title)))
    chosen = [path for path, fit in fits.items() if fit == max(fits.values())]
    return chosen[0] if len(chosen) == 1 else None


def means(name: str, path: str, title: str) -> bool:
    """Return whether a name may mean this document: it has no words but a kind of document, or words of its title."""
    words = _stems(name) - _KINDS
    return not words or bool(words & _stems(f"{title} {path}"))


def may_ask_about(question: str) -> bool:
    """Return whether a question may ask about a document as a whole, by words that are about documents."""
    plain = question.lower()
    if len(question) > QUESTION_CHARACTERS or not _WHOLE_OPENING.match(plain):
        return False
    return not (_SAID | _MAYBE).isdisjoint(re.findall(r"[^\W_]+", plain))


def asks_about(question: str, path: str, title: str) -> bool:
    """Return whether a question asks about this document as a whole, in whatever words.

    It does if it says nothing but words about documents, and words of the document's name.

    >>> asks_about("Quickly, what topics does the staff guide treat?", "staff.md", "Staff guide")
    True
    >>> asks_about("What does the staff guide say about leave?", "staff.md", "Staff guide")
    False
    """
    words = re.findall(r"[^\W_]{2,}", question.lower())
    named = [word for word in words if word not in STOP_WORDS | _GENERIC | _SAID | _MAYBE | _KINDS]
    is_said = not _SAID.isdisjoint(words) or (not named and not _MAYBE.isdisjoint(words))
    return is_said and may_ask_about(question) and _stems(" ".join(named)) <= _stems(f"{title} {path}")


def _stems(text: str) -> set[str]:
    """Return the words of a text without the endings in which a title and a question may differ."""
    words = (_PARTICLE.sub("", word) for word in re.findall(r"[^\W_]+", text.lower()) if word not in _GENERIC)
    return {re.sub(r"(?:es|s)$", "", word) if len(word) > 4 else word for word in words}
