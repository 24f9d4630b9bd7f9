"""Korean words without their particles: 택시비 in 택시비를, 15일 in 15일입니다.

A list of particles and of endings of "to be" and "to do" decides, no dictionary: a noun that ends like one loses it
as well, in question and passage alike, so that they still meet.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Literal

_LISTED = """
    은 는 이 가 을 를 의 에 에서 에는 에서는 에도 에서도 에게 에게서 에게는 께 께서 한테 로 으로 로는 으로는 로서
    으로서 로써 으로써 와 과 와는 과는 하고 랑 이랑 도 만 만은 만이 까지 까지는 까지만 부터 부터는 마다 밖에 조차
    마저 나 이나 든지 이든지 보다 처럼 같이 씩 쯤 들 들이 들은 들을 들의 님 님이 님은 님의 님에게 씨 씨가 씨는 씨의
    라고 이라고 라는 이라는 란 이란 이고 이며 이다 다 입니다 이에요 예요 에요 이었다 였다 이었습니다 였습니다 이지만
    이므로 이라서 라서 이어서 여서 인데 이면 이어야 여야 이요 요 인가요 입니까 인지 이라 라 이었고 였고 때문 이자 죠
    이죠 하다 한다 합니다 하는 하며 하면 하기 하여 해서 해야 했다 했습니다 하지 할 한 되다 된다 됩니다 되는 되며 되어
    되면 되었다 되었습니다 될 된
"""
LETTERS_MIN: Final = 2
"""Letters of a word that stay, at least."""
_LONGEST_FIRST = "|".join(sorted(_LISTED.split(), key=len, reverse=True))
_ONE = f"(?!(?<=[0-9])만)(?:{_LONGEST_FIRST})"  # behind a digit 만 is 10,000
_ENDINGS = {letters: re.compile(rf"(?<=\w{{{letters}}}){_ONE}$") for letters in (1, LETTERS_MIN)}
ENDED = rf"(?:{_ONE})?(?!\w)"
"""What may stand behind a Korean word, up to the end of it, as a regular expression."""


@lru_cache(maxsize=4096)
def stem(word: str, *, letters_min: Literal[1, 2] = LETTERS_MIN) -> str:
    """Return a word without its particles; one without Hangul at its end stays as it is.

    Args:
        letters_min: that stay, at least.

    >>> stem("택시비를"), stem("15일입니다"), stem("고양이가"), stem("나이"), stem("the")
    ('택시비', '15일', '고양', '나이', 'the')
    """
    while (shorter := _ENDINGS[letters_min].sub("", word)) != word:
        word = shorter
    return word
