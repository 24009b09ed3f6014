"""Sound files made unsound, each in one way that a seed decides."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from tests.faults.judge import CANARY

DEEP = 10_000


class Raw(str):
    """Text that stands in JSON as it is."""


HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 10**6, 10**12, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30,
    0.5, -0.0, 1.5, 1e308, Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("Infinity"), Raw("9" * 5000),
    "", " ", "1", "0", "true", "x" * 10_000, "\0", "\n", "a\nb", "\u202e", Raw('"\\ud800"'), "é" * 7,
    "../../etc/passwd", "/etc/passwd", "https://example.org/x", "file:///etc/passwd", "owner/name",
    f"__import__('os').{CANARY}()", f"lambda: {CANARY}", "!!python/object/apply:os.system [true]", "{{ 7 * 7 }}",
    "%s%n", "torch.float32", "float8_e4m3fn", "int8", "bfloat16", "F64", "nan", "inf", [], [[]], {}, {"": None}, [None],
    [0], [1, 2], [1] * 1000, ["x"], {"x": 1}, {"x": {"y": [1]}}, Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP + "1" + "}" * DEEP),
)  # fmt: skip
"""What a file may hold where something else is expected."""


def damaged(data: bytes, chance: Random, most: int | None = None) -> tuple[str, bytes]:
    """Bytes changed somewhere below `most`: (how, the bytes)."""
    content = bytearray(data)
    end = min(len(content), len(content) if most is None else most)
    at = chance.randrange(end) if end else 0
    length = min(chance.choice((1, 1, 2, 4, 8, 64)), len(content) - at)
    how = chance.choice(
        ("cut", "flip", "flip", "flip", "flip", "noise", "insert", "delete", "zero", "repeat", "extend")
    )
    if how == "cut":
        del content[at:]
    elif how == "flip":
        content[at : at + 1] = bytes(b ^ (1 << chance.randrange(8)) for b in content[at : at + 1])
    elif how == "noise":
        content[at : at + length] = chance.randbytes(length)
    elif how == "insert":
        content[at:at] = chance.randbytes(length)
    elif how == "delete":
        del content[at : at + length]
    elif how == "zero":
        content[at : at + length] = bytes(length)
    elif how == "repeat":
        content[at:at] = content[at : at + length]
    else:
        content += chance.randbytes(length)
    return f"{how} at {at}, {length}", bytes(content)


def _places(value: Any, here: tuple = ()) -> list[tuple]:
    """The paths of all values within a JSON value, itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in inner for place in ((*here, key), *_places(child, (*here, key)))]


def mangled(
    value: Any, chance: Random, hostile: tuple[Any, ...] = HOSTILE, at: Callable[[tuple], bool] = lambda place: True
) -> tuple[str, bytes]:
    """JSON text of a value in which one thing is another, missing, there twice, or called otherwise: (how, the text).
    at: which places may be changed."""
    changed = copy.deepcopy(value)
    places = [place for place in _places(changed) if at(place)]
    how = chance.choice(("put", "put", "put", "put", "put", "drop", "rename", "twice", "add", "swap", "bytes"))
    if how == "bytes" or not places:
        what, text = damaged(json.dumps(value).encode(), chance)
        return f"bytes: {what}", text
    place = chance.choice(places)
    parent, key = changed, place[-1]
    for step in place[:-1]:
        parent = parent[step]
    bad = chance.choice(hostile)
    if how == "drop":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[chance.choice(("", "x", str(key).upper(), "__class__", "auto_map", "trust_remote_code"))] = parent.pop(
            key
        )
    elif how == "twice" and isinstance(parent, dict):
        parent[_Twice(key)] = bad
    elif how == "add" and isinstance(parent, dict):
        parent[chance.choice(("x", "", "_class", "dtype", "torch_dtype", "quantization_config"))] = bad
    elif how == "swap":
        other = chance.choice(places)
        source = changed
        for step in other:
            source = source[step]
        parent[key] = copy.deepcopy(source)
        bad = f"that of {'.'.join(map(str, other))}"
    else:
        how, parent[key] = "put", bad
    return f"{how} {'.'.join(map(str, place))} {str(bad)[:40]!r}", rendered(changed)


class _Twice(str):
    """A key beside an equal one: a dictionary takes it for another."""

    def __hash__(self) -> int:
        return hash((str(self), "twice"))

    def __eq__(self, other: object) -> bool:
        return self is other


def rendered(value: Any) -> bytes:
    """JSON text, Raw as it is."""
    found: list[str] = []

    def marked(part: Any) -> Any:
        if isinstance(part, Raw):
            found.append(part)
            return f"<raw {len(found) - 1}>"
        if isinstance(part, dict):
            return {key: marked(child) for key, child in part.items()}
        return [marked(child) for child in part] if isinstance(part, list) else part

    text = json.dumps(marked(value))
    for number, raw in enumerate(found):
        text = text.replace(f'"<raw {number}>"', raw)
    return text.encode()


def misencoded(text: str, chance: Random) -> tuple[str, bytes]:
    """Text in another encoding, with other line ends, or with bytes that are none: (how, the bytes)."""
    words = "页面 模型 压缩 naïve café"
    how = chance.choice(
        ("gbk", "utf-16", "utf-32", "latin-1", "utf-8-sig", "nul", "surrogate", "carriage", "bytes", "empty", "blank",
         "control", "long", "sound")
    )  # fmt: skip
    if how in ("gbk", "utf-16", "utf-32", "utf-8-sig"):
        return how, (words + text).encode(how, errors="ignore")
    if how == "latin-1":
        return how, ("naïve café " + text).encode(how)
    if how == "bytes":
        what, data = damaged(text.encode(), chance)
        return f"bytes: {what}", data
    at = chance.randrange(len(text))
    put = {
        "nul": b"\0", "surrogate": b"\xed\xa0\x80", "carriage": b"\r", "control": b"\x1b[2J\x07", "sound": b" w3 ",
        "long": b"w" * 100_000, "empty": None, "blank": None,
    }[how]  # fmt: skip
    if put is None:
        return how, b"" if how == "empty" else b"\n \n"
    return how, text[:at].encode() + put + text[at:].encode()
