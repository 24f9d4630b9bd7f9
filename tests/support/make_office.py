"""Small office files that no library at hand writes: Hangul documents, locked ones, and mails that are broken."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from datetime import datetime

NONE, END, FAT_SECTOR = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
SECTOR, STREAM_MIN = 512, 4096


def make_zip(parts: Mapping[str, str | bytes]) -> bytes:
    """Return an archive of these parts."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in parts.items():
            archive.writestr(name, body)
    return out.getvalue()


HWPX = {
    "mimetype": "application/hwp+zip",
    "Contents/content.hpf": (
        '<opf:package xmlns:opf="http://www.idpf.org/2007/opf/"><opf:metadata><opf:title>항만 규정</opf:title>'
        '<opf:meta name="creator" content="text">김민</opf:meta>'
        '<opf:meta name="ModifiedDate" content="text">2026-01-05T05:30:00Z</opf:meta></opf:metadata></opf:package>'
    ),
    "Contents/header.xml": (
        '<hh:head xmlns:hh="h"><hh:styles><hh:style id="0" name="바탕글"/><hh:style id="2" name="개요 1"/>'
        "</hh:styles></hh:head>"
    ),
    "Contents/section0.xml": (
        '<hs:sec xmlns:hs="s" xmlns:hp="p"><hp:p styleIDRef="2"><hp:run><hp:t>제1장 크레인</hp:t></hp:run></hp:p>'
        "<hp:p styleIDRef='0'><hp:run><hp:t>항만에는 크레인이<hp:lineBreak/>세 대 있다.</hp:t></hp:run><hp:run>"
        "<hp:tbl><hp:tr><hp:tc><hp:subList><hp:p><hp:run><hp:t>이름</hp:t></hp:run></hp:p></hp:subList></hp:tc>"
        "<hp:tc><hp:subList><hp:p><hp:run><hp:t>톤</hp:t></hp:run></hp:p></hp:subList></hp:tc></hp:tr>"
        "<hp:tr><hp:tc><hp:subList><hp:p><hp:run><hp:t>안나</hp:t></hp:run></hp:p></hp:subList></hp:tc>"
        "<hp:tc><hp:subList><hp:p><hp:run><hp:t>12</hp:t></hp:run></hp:p></hp:subList></hp:tc></hp:tr></hp:tbl>"
        "</hp:run></hp:p></hs:sec>"
    ),
    "Contents/section10.xml": '<hs:sec xmlns:hs="s" xmlns:hp="p"><hp:p><hp:t>끝.</hp:t></hp:p></hs:sec>',
    "Contents/section2.xml": '<hs:sec xmlns:hs="s" xmlns:hp="p"><hp:p><hp:t># 둘</hp:t></hp:p></hs:sec>',
}


def make_hwpx(**parts: str) -> bytes:
    """Return a Hangul document of the open format; *parts* replace or add some, with ``__`` for a slash."""
    return make_zip({**HWPX, **{name.replace("__", "/"): body for name, body in parts.items()}})


def record(tag: int, level: int, body: bytes) -> bytes:
    """Return a record of a Hangul document."""
    head = tag | level << 10
    return struct.pack("<I", head | len(body) << 20) + body if len(body) < 0xFFF else (
        struct.pack("<II", head | 0xFFF << 20, len(body)) + body
    )  # fmt: skip


def words(text: str) -> bytes:
    """Return the text of a paragraph as a Hangul document holds it, with the mark of its end."""
    return (text + "\r").encode("utf-16-le")


def control(unit: int, kind: bytes = b"lbt ") -> bytes:
    """Return a control of eight units in the text of a paragraph."""
    return struct.pack("<H", unit) + kind + bytes(8) + struct.pack("<H", unit)


def cell(row: int, column: int, text: str) -> bytes:
    """Return the records of a cell."""
    return record(72, 2, struct.pack("<HHIHH", 1, 0, 0, column, row) + bytes(20)) + record(67, 3, words(text))


SECTION = (
    record(67, 1, control(2, b"dces") + words("항만에는 크레인이\n세 대 있다."))
    + record(71, 1, b"dces" + bytes(20))
    + record(71, 1, b"daeh" + bytes(20))
    + record(72, 2, bytes(20))
    + record(67, 3, words("머리글은 읽지 않는다"))
    + record(67, 1, control(11) + words("# 표"))
    + record(71, 1, b" lbt" + bytes(20))
    + record(77, 2, bytes(20))
    + cell(0, 0, "이름") + cell(0, 1, "톤") + cell(1, 0, "안나") + cell(1, 1, "12")
    + record(67, 1, words("끝." + "길" * 3000))
)  # fmt: skip


def make_hwp(section: bytes = SECTION, *, flags: int = 1, version: int = 5) -> bytes:
    """Return a Hangul document of the binary format."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(section) + packer.flush() if flags & 1 else section
    header = b"HWP Document File".ljust(32, b"\0") + struct.pack("<II", version << 24, flags)
    return make_ole({"FileHeader": header, "\x05HwpSummaryInformation": _summary(), "Section0": body})


def _summary() -> bytes:
    """Return a property set with title, author and last change."""
    text = {2: "항만 규정", 4: "김민"}
    changed = round((datetime(2026, 1, 5, 5, 30) - datetime(1601, 1, 1)).total_seconds()) * 10**7
    values = {
        **{key: struct.pack("<II", 31, len(one) + 1) + (one + "\0").encode("utf-16-le") for key, one in text.items()},
        13: struct.pack("<IQ", 64, changed),
    }
    at, places, bodies = 8 + 8 * len(values), b"", b""
    for key, value in values.items():
        places += struct.pack("<II", key, at + len(bodies))
        bodies += value.ljust(-(-len(value) // 4) * 4, b"\0")
    section = struct.pack("<II", at + len(bodies), len(values)) + places + bodies
    return struct.pack("<HHI16sI16sI", 0xFFFE, 0, 0, bytes(16), 1, bytes(16), 48) + section


def make_ole(streams: Mapping[str, bytes]) -> bytes:
    """Return an OLE container of streams of at least 4 KiB each; those named ``Section`` are in ``BodyText``."""
    padded = {name: body.ljust(STREAM_MIN, b"\0") for name, body in streams.items()}
    sizes = [-(-len(body) // SECTOR) for body in padded.values()]
    fats = -(-(sum(sizes) + 4) // (SECTOR // 4 - 1))
    fat, starts = [FAT_SECTOR] * fats, []
    for size in (2, *sizes):  # the directory comes first
        starts.append(len(fat))
        fat += [*range(len(fat) + 1, len(fat) + size), END]
    fat += [NONE] * (fats * SECTOR // 4 - len(fat))
    outer = [name for name in padded if not name.startswith("Section")]
    inner = [name for name in padded if name.startswith("Section")]
    first = len(outer) + 2
    entries = [_entry("Root Entry", 5, child=1)]
    at = dict(zip(padded, starts[1:], strict=True))
    for place, name in enumerate(outer, 1):
        right = place + 1 if place < len(outer) else (first - 1 if inner else NONE)
        entries.append(_entry(name, 2, right=right, start=at[name], size=len(padded[name])))
    if inner:
        entries.append(_entry("BodyText", 1, child=first))
        for place, name in enumerate(inner, first):
            right = place + 1 if name != inner[-1] else NONE
            entries.append(_entry(name, 2, right=right, start=at[name], size=len(padded[name])))
    directory = b"".join(entries).ljust(2 * SECTOR, b"\0")
    head = struct.pack(
        "<8s16sHHHHH6xIIIIIIIII", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", bytes(16), 0x3E, 3, 0xFFFE, 9, 6,
        0, fats, starts[0], 0, STREAM_MIN, END, 0, END, 0,
    )  # fmt: skip
    head += struct.pack("<109I", *(*range(fats), *[NONE] * (109 - fats)))
    bodies = b"".join(body.ljust(-(-len(body) // SECTOR) * SECTOR, b"\0") for body in padded.values())
    return head + struct.pack(f"<{len(fat)}I", *fat) + directory + bodies


def _entry(name: str, kind: int, *, right: int = NONE, child: int = NONE, start: int = END, size: int = 0) -> bytes:
    encoded = name.encode("utf-16-le") + b"\0\0"
    links = struct.pack("<III", NONE, right, child)
    place = struct.pack("<IQ", start if kind == 2 else (END if kind == 5 else 0), size)
    return encoded.ljust(64, b"\0") + struct.pack("<HBB", len(encoded), kind, 1) + links + bytes(36) + place


def make_locked_package() -> bytes:
    """Return what an office program writes for a docx, pptx or xlsx with a password."""
    return make_ole({"EncryptionInfo": b"x", "EncryptedPackage": b"y"})
