"""The files of the page as they are served: the bytes of their authors, and a policy that lets nothing else load."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import pytest

from gistrag.server.page import FOLDER

VENDORED = [
    line.split("  ")
    for line in (FOLDER / "vendor" / "VERSIONS.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize("row", VENDORED, ids=lambda row: row[1])
def test_a_library_is_served_as_it_was_published(client: Any, row: list[str]) -> None:
    """Its bytes have the recorded sha256, its license lies beside it, and no key is needed."""
    sha256, name, package, _, license_name = row
    reply = client.get(f"/static/vendor/{name}")

    assert hashlib.sha256(reply.content).hexdigest() == sha256
    assert package.rpartition("@")[2] in reply.text[:400]
    assert reply.headers["content-type"].startswith("text/javascript")
    assert (FOLDER / "vendor" / license_name.partition("(")[2].rstrip(")")).stat().st_size > 1000


def test_every_library_is_recorded() -> None:
    """No script lies in the folder that VERSIONS.txt does not name."""
    assert {row[1] for row in VENDORED} == {path.name for path in (FOLDER / "vendor").glob("*.js")}


def test_the_page_runs_no_script_of_its_own_text(client: Any) -> None:
    """The policy forbids inline scripts and styles, and the page holds none; every file it names exists."""
    reply = client.get("/")
    policy = reply.headers["content-security-policy"]

    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<style|<script(?![^>]* src=)|\son\w+=", reply.text)
    loaded = re.findall(r'(?:src|href)="(static/[^"]+)"', reply.text)
    assert len(loaded) >= 4
    assert [client.get(f"/{path}").status_code for path in loaded] == [200] * len(loaded)
    assert client.get("/static/vendor/VERSIONS.txt").status_code == 404
    assert client.get("/static/../app.py").status_code == 404
