"""The training mask is its picture."""

from __future__ import annotations

from support.mask import gist_mask

PICTURE = """
P  1 . . . . . . . .
a  1 1 . . . . . . .
b  1 1 1 . . . . . .
G  1 1 1 1 . . . . .
P  . . . . 1 . . . .
c  . . . . 1 1 . . .
d  . . . . 1 1 1 . .
G  . . . . 1 1 1 1 .
q  1 . . 1 . . . 1 1
"""


def test_mask_is_the_picture() -> None:
    """Two chunks of two tokens with one gist each give the picture of the manual."""
    expected = [[cell == "1" for cell in line.split()[1:]] for line in PICTURE.strip().splitlines()]

    assert expected == gist_mask(1, [(2, 1), (2, 1)], 1).tolist()


def test_gists_of_one_chunk_see_each_other() -> None:
    """Gists look in both directions among themselves, question tokens only backwards."""
    mask = gist_mask(0, [(1, 2)], 2)

    assert mask[1:3, 1:3].all()
    assert [True, False] == mask[3, 3:].tolist()
