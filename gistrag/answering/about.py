"""Greetings, thanks, and questions about the assistant: answered with one sentence, and without a search.

Only a short message that is nothing else counts. "What can you do?" asks about the assistant; "What can you do when the
pump leaks?" asks the documents.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

from gistrag.qa.phrases import Language, Phrase, phrase

Kind = Literal["greeting", "thanks", "goodbye", "about", "documents"]

MESSAGE_CHARACTERS = 80
NAMES_MAX = 12

_TO = r"(?: (?:there|all|everyone|again|assistant|bot|gistrag))?"
_FILES = r"(?:documents?|docs|files?|sources|texts)"
_HAVE = r"(?:have|know|know about|hold|contain|use|search|answer from)"
_HERE = r"(?:there|available|indexed|loaded|included|in (?:here|there|(?:the|this|your) (?:index|collection|library)))"
_BEING = r"(?:an? )?(?:bot|ai|robot|machine|person|human(?: being)?)"
_CAN = r"(?:할 수 있|도와줄 수 있)(?:어|어요|나요|습니까)"
_ARE = r"(?:있|가지고 있|알고 있)(?:어|어요|나요|습니까)"
PATTERNS: dict[Kind, tuple[str, ...]] = {
    "greeting": (
        rf"(?:hi|hello|hey|howdy|greetings|good (?:morning|afternoon|evening|day)|nice to meet you){_TO}",
        r"how are you(?: doing)?(?: today)?",
        r"안녕(?:하세요|하십니까)?|반가워요?|반갑습니다|처음 뵙겠습니다",
    ),
    "thanks": (
        r"(?:ok |okay |great |perfect )?(?:many thanks|thanks|thx|cheers|thank you)"
        rf"(?: (?:a lot|very much|so much|again|for (?:your|the) help|that helped|that was helpful)){{0,2}}{_TO}",
        r"(?:정말 |매우 )?(?:고마워요?|고맙습니다|감사합니다|감사해요)",
    ),
    "goodbye": (
        rf"(?:good ?bye|bye|bye bye|see you(?: later| soon)?|good night){_TO}",
        r"안녕히 계세요|잘 있어요?|다음에 봐요?",
    ),
    "about": (
        r"(?:who|what) are you|what are you (?:for|able to do)|what(?: is| s) your name|tell me about yourself",
        r"what(?: exactly)? (?:can|could) you do(?: for me)?|what do you do|how (?:can|could) you help(?: me)?",
        r"what (?:can|should) i ask(?: you)?(?: about)?|what (?:questions )?can you answer|help|introduce yourself",
        rf"are you {_BEING}(?: or {_BEING})?",
        rf"(?:너는|넌|당신은) (?:누구|뭐|무엇)\w{{1,4}}|(?:뭘|무엇을|뭐를) {_CAN}|자기소개 해 ?(?:줘|주세요)|도움말",
    ),
    "documents": (
        rf"(?:which|what) {_FILES} (?:do you {_HAVE}|are {_HERE})|what do you know(?: about)?",
        rf"(?:list|show|name|give)(?: me)?(?: all)?(?: the| your| of your| of the)? {_FILES}(?: you (?:have|know))?",
        rf"how many {_FILES} (?:do you {_HAVE}|are {_HERE})",
        rf"(?:어떤|무슨) (?:문서|파일|자료)(?:가|를|들이|들을)? {_ARE}|무엇을 {_ARE}",
        r"문서 목록을?(?: 보여 ?(?:줘|주세요))?",
    ),
}
"""The whole messages of each kind, without marks and capitals."""
_COMPILED = {kind: re.compile("|".join(patterns)) for kind, patterns in PATTERNS.items()}
_OPENING = re.compile(rf"(?:{_COMPILED['greeting'].pattern}|so|ok|okay|well|please|그럼) (?=\S)")
_CLOSING = re.compile(r" (?:please|then|now|today|exactly|actually|좀)$")


def kind_of(message: str) -> Kind | None:
    """Return what a message is that asks nothing of the documents, None for every other one.

    >>> kind_of("Hello!"), kind_of("Hi, what can you do?"), kind_of("Hello, who holds the lock?")
    ('greeting', 'about', None)
    """
    if len(message) > MESSAGE_CHARACTERS:
        return None
    plain = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", message).lower()))
    for said in (plain, _CLOSING.sub("", _OPENING.sub("", plain, count=1))):
        for kind, pattern in _COMPILED.items():
            if pattern.fullmatch(said):
                return kind
    return None


def reply(kind: Kind, paths: Sequence[str], *, language: Language = "en") -> str:
    """Return the answer: what this is, and which documents it answers from.

    Args:
        paths: of all documents of the index.

    >>> reply("greeting", ["a.md", "b.md"])
    'Hello! I answer questions from the 2 documents of this index: a.md and b.md.'
    """
    opening = phrase(kind, language) if kind in ("greeting", "thanks", "goodbye") else ""
    *names, last = paths[:NAMES_MAX] or [""]
    more = len(paths) - NAMES_MAX
    form: Phrase = "about many" if more > 0 else "about some" if names else "about one" if paths else "about none"
    told = phrase(form, language).format(count=len(paths), names=", ".join(names), last=last, more=more)
    return f"{opening}{told}"
