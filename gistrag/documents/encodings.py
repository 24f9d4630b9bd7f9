"""Bytes that are not UTF-8 → the East Asian encoding they are in, if that is sure.

charset-normalizer proposes, and a proposal counts only where the text then has the letters that its language is mostly
written with. A text of a few letters fits several encodings, so it fits none here: it is refused rather than misread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gistrag.documents.text import require_length

SAMPLE_BYTES = 2**18
LETTERS_MIN = 8
COMMON_MIN = 0.9
ENCODINGS: Mapping[str, tuple[str, str]] = {
    "cp949": ("euc_kr", r"[가-힣]"),
    "cp932": ("cp932", r"[ぁ-ヿ一-鿿]"),
    "gb18030": ("gb2312", r"[一-鿿]"),
}
"""Encoding → the smaller one that holds the common letters, and a pattern of the letters of the language."""
_FOREIGN = {"cp949": r"[ぁ-ヿ]", "cp932": r"[가-힣]", "gb18030": r"[ぁ-ヿ가-힣]"}
_KANA = re.compile(r"[ぁ-ヿ]")


def recoded(data: bytes) -> tuple[str, str]:
    """Return the text of bytes in an East Asian encoding, and the name of the encoding; ("", "") if it is not sure."""
    encoding = guessed(data)
    if not encoding:
        return "", ""
    require_length(len(data) // 4)  # of the fewest characters that there can be
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError:  # behind the sample
        return "", ""


def guessed(data: bytes) -> str:
    """Return the encoding of *data*, ``""`` where it is not sure; decided by the first `SAMPLE_BYTES` that are lines.

    >>> guessed("크레인 세 대를 수리하기로 했다.".encode("cp949")), guessed("café".encode("latin-1"))
    ('cp949', '')
    """
    from charset_normalizer import from_bytes

    sample = data[:SAMPLE_BYTES]
    if len(data) > SAMPLE_BYTES:
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    if b"\0" in sample:
        return ""
    fitting = [match for match in from_bytes(sample, cp_isolation=list(ENCODINGS)) if _fits(match)]
    is_sure = bool(fitting) and all(other.chaos > fitting[0].chaos for other in fitting[1:])
    return str(fitting[0].encoding) if is_sure else ""


def _fits(match: Any) -> bool:
    """Return whether the text of a proposal is written with common letters of the language of its encoding."""
    encoding, text = str(match.encoding), str(match)
    common, pattern = ENCODINGS[encoding]
    letters = [letter for letter in text if letter > "\x7f" and letter.isalpha()]
    own = [letter for letter in letters if re.match(pattern, letter)]
    if len(own) < LETTERS_MIN or re.search(_FOREIGN[encoding], text):
        return False
    if encoding == "cp932" and not _KANA.search(text):
        return False
    usual = "".join(own).encode(common, "ignore").decode(common)
    return min(len(own) / len(letters), len(usual) / len(own)) >= COMMON_MIN
