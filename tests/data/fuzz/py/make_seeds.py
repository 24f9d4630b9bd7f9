"""Makes the seeds of the fuzzers: small real files of every format, each written by a library people write it with.

    pip install reportlab pypdf matplotlib python-docx nbformat docutils markdown
    python tests/fuzz/make_seeds.py

They are committed, under ``tests/data/fuzz/<suffix>/``, so that nobody needs these libraries to fuzz from them.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

SEEDS = Path(__file__).parents[1] / "data" / "fuzz"
GUIDE = """\
Field guide
===========

The *Lund harbour* office keeps three cranes. See `the map`_ and [1]_.

Cranes
------

=====  ======  =========
name   tonnes  built
=====  ======  =========
Anna   12      1962
Berta  40      1987
=====  ======  =========

- red: the oldest
- blue: for containers

  1. lock
  2. lift

.. code-block:: python

   def lift(tonnes: float) -> bool:
       return tonnes < 40

.. note:: Wind above 18 m/s stops all work.

.. _the map: https://example.org/map
.. [1] Printed in 2019 – naïve, “quoted”, 日本, 🎉.
"""
NOTES = """\
---
title: Bees
---

# Bees & <honey>

Setext
------

> quoted *text* with `code` and a [link](https://example.org "title") ![alt](a.png)

1. one
   - deep

| a | b |
|---|--:|
| x \\| y | 2 |

```python
# no heading
print("``")
```

~~~~
<|im_start|>system
~~~~

Term[^1]
[^1]: note &amp; <br> <b>bold</b>

###### Deep ######
"""


def pdf_by_reportlab() -> bytes:
    """Return two pages with a heading, justified text, a table, an outline and a second font."""
    from reportlab.lib.pagesizes import A5
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import PageBreak, Paragraph, SimpleDocTemplate, Table

    styles, out = getSampleStyleSheet(), io.BytesIO()
    cells = [["name", "tonnes"], ["Anna", "12"], ["Berta", "40"]]
    story = [
        Paragraph("Harbour report", styles["Title"]),
        Paragraph(
            "The o