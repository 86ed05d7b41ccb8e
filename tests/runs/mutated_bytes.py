"""Files that are cut, flipped, repeated and enlarged."""

from __future__ import annotations

import io
import zipfile
from random import Random

REPEATED = [
    b"\0", b"\xff", b"9", b"\n", b":", b"[", b"{", b"]", b"(", b"}", b")\x85", b"\x8f", b"\x94", b"h\0", b"N",
    b"2", b"[],", b'{"":0},', b"[[", b'"a",', b"a=[]\n", b"cA\nB\n", b"r\xff\xff\xff\x7f",
]  # fmt: skip


def mutated(data: bytes, chance: Random, most_bytes: int) -> bytes:
    """Return other bytes; those of a zip file are often a zip file again, with another pickle in it.

    Args:
        data: the content of a file.
        chance: decides.
        most_bytes: that are added at once.
    """
    if not data.startswith(b"PK") or chance.random() < 0.3:
        return _mutated(data, chance, most_bytes)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("/data.pkl"))
    if chance.random() < 0.2:
        name = chance.choice(sorted(members))
    members[name] = _mutated(members[name], chance, most_bytes)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return stream.getvalue()


def _mutated(data: bytes, chance: Random, most_bytes: int) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        start, end = sorted(chance.randint(0, len(changed)) for _ in range(2))
        match chance.choice(["cut", "flip", "flip", "repeat", "enlarge", "enlarge", "put"]):
            case "cut":
                del changed[start:end]
            case "flip" if changed:
                bit = chance.randrange(8 * len(changed))
                changed[bit // 8] ^= 1 << bit % 8
            case "repeat":
                part = changed[start:end][:most_bytes]
                changed[end:end] = part * chance.randint(1, max(1, most_bytes // max(1, len(part))))
            case "enlarge":
                part = chance.choice(REPEATED)
                changed[start:start] = part * chance.choice([1, 100, most_bytes // len(part)])
            case _:
                changed[start : start + 4] = chance.choice(REPEATED)
    return bytes(changed)
