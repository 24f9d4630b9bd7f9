"""Mails and mailboxes become text with date, sender and subject, whatever is broken in them."""

from __future__ import annotations

import email
from email.message import EmailMessage
from email.policy import default

import pytest
from support.hostile_files import SEEDS
from support.make_files import make_docx
from support.tiny_models import byte_tokenizer

from gistrag.documents.chunking import Chunker
from gistrag.documents.discovery import Document
from gistrag.documents.formats.mail import ATTACHMENTS_MAX, NESTED_MAX
from gistrag.documents.readers import read
from gistrag.errors import DocumentError
from gistrag.model.tokenizer import plain_tokenizer

KOREAN = "크레인 세 대를 수리하기로 했다. 비용은 다음 주에 정한다."


def letter(body: str = "words", **headers: str) -> EmailMessage:
    """Return a plain message."""
    message = EmailMessage()
    for name, value in {"subject": "Crane", "from": "a@example.org", **headers}.items():
        message[name] = value
    message.set_content(body)
    return message


def raw(body: bytes, *, headers: bytes = b"") -> bytes:
    """Return the bytes of a message with this body, as no program would write them."""
    return b"Subject: Crane\n" + headers + b"\n" + body


def test_a_message_says_who_when_and_what() -> None:
    """Subject as heading, headers, the plain form of the body, and attachments by name, with their text."""
    result = read(SEEDS["email.eml"], "a.eml")

    assert result.text == (
        "# 크레인 of January\n\nFrom: 김민 <kim@example.org>\nTo: Ann <ann@example.org>, bo@example.org\n"
        "Date: Mon, 05 Jan 2026 14:30:00 +0900\n\nCrane Anna lifts 12 tonnes.\n\nFrom Monday on it is painted.\n\n"
        "\\# not a heading\n크레인\n\n## Attachment: 크레인.csv\n\nname: Anna\ntonnes: 12\n\n## Attachment: crane.png"
    )
    assert result.metadata == {
        "date": "2026-01-05T14:30:00+09:00",
        "from": "김민 <kim@example.org>",
        "to": "Ann <ann@example.org>, bo@example.org",
        "subject": "크레인 of January",
    }


def test_each_message_of_a_mailbox_has_its_metadata_and_its_chunks() -> None:
    """A line that begins with From inside of a message ends none, and no chunk spans two messages."""
    result = read(SEEDS["mailbox.mbox"], "a.mbox")
    made = {"path": "a.mbox", "sha256": "", "size": 1, "mtime_ns": 1, "kind": result.kind}
    document = Document(**made, text=result.text, parts=result.parts)

    chunks = Chunker(plain_tokenizer(byte_tokenizer()), chunk_tokens=2048).split(document)

    assert [part.metadata["subject"] for part in result.parts] == ["First crane", "둘째 크레인"]
    assert [part.metadata["date"][:10] for part in result.parts] == ["2026-01-05", "2026-01-12"]
    assert result.text[result.parts[1].start :].startswith("# 둘째 크레인")
    assert "\n\nFrom Monday on it is painted." in result.text
    assert [chunk.start for chunk in chunks] == [part.start for part in result.parts]


def test_a_web_page_is_read_where_there_is_no_plain_text() -> None:
    """Its headings stand below the subject."""
    message = letter()
    message.set_content("<h1>Wind</h1><p>stops <b>all</b> work<script>x()</script>", subtype="html")

    assert read(message.as_bytes(), "a.eml").text.endswith("### Wind\n\nstops all work")


def test_a_body_that_is_no_page_costs_no_other_message() -> None:
    """What is wrong with a body stands in its place."""
    mailbox = b"".join(
        b"From a@b\nSubject: x\nContent-Type: text/html\n\n" + body + b"\n\n" for body in (b"<!--" * 9_999, b"<p>kept")
    )

    text = read(mailbox, "a.mbox").text
    assert "(not read: a tag or comment that nothing closes, " in text
    assert "kept" in text


def test_a_document_that_is_attached_is_read() -> None:
    """Its headings stand below its name; a locked one is named with the reason."""
    message = letter()
    message.add_attachment(make_docx(), maintype="application", subtype="octet-stream", filename="../Handbook.docx")
    message.add_attachment(b"\xd0\xcf\x11\xe0", maintype="application", subtype="octet-stream", filename="old.docx")

    text = read(message.as_bytes(), "a.eml").text

    assert "## Attachment: Handbook.docx\n\n### Handbook\n\nRead me first.\n\n#### Tools" in text
    assert text.endswith(
        "## Attachment: old.docx\n\n(not read: an older format named .docx; save it as docx without a password)"
    )


def test_messages_inside_of_messages_are_read_to_a_depth() -> None:
    """Ten deep: the outer ones are read, and a line says that the others are not."""
    message = letter("the deepest")
    for depth in range(10):
        outer = letter(f"level {10 - depth}")
        outer.add_attachment(message)
        message = outer

    text = read(message.as_bytes(), "a.eml").text

    assert f"level {NESTED_MAX + 1}" in text
    assert f"(a message inside of {NESTED_MAX} others is not read)" in text
    assert "the deepest" not in text


def test_mails_attached_as_files_ten_deep_are_cheap() -> None:
    """The text of the first is read, what it attaches is named."""
    message = letter("the deepest")
    for depth in range(10):
        outer = letter(f"level {10 - depth}")
        outer.add_attachment(
            message.as_bytes(), maintype="application", subtype="octet-stream", filename=f"{10 - depth}.eml"
        )
        message = outer

    text = read(message.as_bytes(), "a.eml").text

    assert "level 2" in text
    assert text.endswith("#### Attachment: 2.eml") or "Attachment: 2.eml" in text
    assert "level 3" not in text


def test_attachments_beyond_the_limit_are_named_only() -> None:
    """Reading ten thousand would take hours."""
    message = letter()
    for number in range(ATTACHMENTS_MAX + 2):
        message.add_attachment("a,b\n1,2\n", subtype="csv", filename=f"{number}.csv")

    text = read(message.as_bytes(), "a.eml").text

    assert text.count("a: 1\nb: 2") == ATTACHMENTS_MAX
    assert text.endswith(f"## Attachment: {ATTACHMENTS_MAX + 1}.csv\n\n(not read: one of more than {ATTACHMENTS_MAX})")


@pytest.mark.parametrize(
    ("body", "said", "expected"),
    [
        (KOREAN.encode("cp949"), "euc-kr", KOREAN),
        (KOREAN.encode("cp949"), "utf-8", KOREAN),
        (KOREAN.encode("cp949"), "us-ascii", KOREAN),
        (KOREAN.encode("cp949"), "iso-8859-1", KOREAN),
        (KOREAN.encode("cp949"), "no-such-thing", KOREAN),
        (KOREAN.encode(), "iso-8859-1", KOREAN),
        ("똠방각하".encode("cp949"), "ks_c_5601-1987", "똠방각하"),
        ("café".encode("latin-1"), "iso-8859-1", "café"),
        (b"caf\xe9 \xff", "utf-8", "(this part is in an unknown encoding)"),
    ],
)
def test_a_wrong_charset_is_found_out(body: bytes, said: str, expected: str) -> None:
    """What is said holds if the bytes allow it and it says something; no character is ever replaced."""
    text = read(raw(body, headers=f"Content-Type: text/plain; charset={said}\n".encode()), "a.eml").text

    assert text.endswith(expected)
    assert "\ufffd" not in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (raw(b"x", headers=b"Subject: =?none?q?x?=\nDate: 99 Foo 2026\nFrom: =?utf-8?b?!!?=\n"), "x"),
        (raw(b"x", headers=b"Content-Transfer-Encoding: base64\n"), "Crane"),
        (raw(b"--C\n\nx", headers=b"Content-Type: multipart/mixed; boundary=B\n"), "Crane"),
        (
            raw(b"--B\nContent-Type: text/plain\n\nhello", headers=b"Content-Type: multipart/mixed; boundary=B\n"),
            "hello",
        ),
        (raw(b"x", headers=b"Content-Type: multipart/mixed\n"), "Crane"),
    ],
)
def test_broken_mime_gives_what_text_there_is(data: bytes, expected: str) -> None:
    """Encodings, dates and boundaries that are none cost nothing but themselves."""
    result = read(data, "a.eml")

    assert expected in result.text
    assert "date" not in result.metadata


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.eml", b"no header, only words", "not a mail"),
        ("a.mbox", b"Subject: x\n\ny", "not a mailbox"),
        ("a.mbox", b"", "empty"),
    ],
)
def test_what_is_no_mail_is_refused(name: str, data: bytes, expected: str) -> None:
    """One line says why."""
    with pytest.raises(DocumentError, match=f"^{expected}"):
        read(data, name)


def test_the_seeds_are_what_the_library_reads() -> None:
    """The real file is sound: the standard library finds no defect in it."""
    assert email.message_from_bytes(SEEDS["email.eml"], policy=default).defects == []
