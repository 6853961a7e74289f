"""Damage to GGUF files where it hurts: counts, lengths, types, dimensions, offsets, alignment.

The fields are found by the `gguf` package's own reader, in the undamaged file.
"""

import random
import tempfile
from collections.abc import Callable

import gguf
import numpy as np

COUNTS = [0, 1, 2, 3, 4, 8, 9, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63,
          2**64 - 1]  # fmt: skip
START = 24  # of the first key: magic, version, two counts
ARRAY, UINT8, STRING = 9, 0, 8


def _parts(content: bytearray) -> list[tuple[int, int, bool]]:
    """(start, bytes, whether it is text) of every field of the header."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(content)
        file.flush()
        reader = gguf.GGUFReader(file.name)
        base = reader.data.ctypes.data
        fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
        found = {
            (part.ctypes.data - base, part.nbytes, part.dtype == np.uint8)
            for field in fields for part in field.parts if part.nbytes
        }  # fmt: skip
        return sorted(found)


def number(rng: random.Random, content: bytearray) -> None:
    """One number of the header: a count, a length, a type, a dimension, an offset, a value."""
    places = [(start, size) for start, size, text in _parts(content) if not text]
    few = [place for place in places if place[0] < 2000 or place[0] > places[-1][0] - 2000]
    start, size = rng.choice(few if rng.random() < 0.7 else places)
    true = int.from_bytes(content[start : start + size], "little")
    lie = rng.choice([*COUNTS, true + 1, true - 1, 2 * true, true ^ (1 << rng.randrange(8 * size))])
    content[start : start + size] = (lie % (1 << 8 * size)).to_bytes(size, "little")


def name(rng: random.Random, content: bytearray) -> None:
    """A key, a tensor's name or a value of text, its length kept."""
    places = [(start, size) for start, size, text in _parts(content) if text and size > 1]
    start, size = rng.choice(places)
    other, length = rng.choice(places)
    bad = [b"\xff" * size, b"\x1b[2J\n" * size, rng.randbytes(size), b"\0" * size]
    content[start : start + size] = rng.choice([*bad, content[other : other + length] * size])[
        :size
    ]


def key(rng: random.Random, content: bytearray) -> None:
    """One more key in front: arrays within arrays, arrays without an end, another alignment."""
    depth, huge = rng.choice([1, 2, 60, 5000]), rng.choice([10**6, 10**8, 2**40, 2**63])
    label, value = rng.choice(
        [
            ("x", _u32(ARRAY) + (_u32(ARRAY) + _u64(1)) * depth + _u32(UINT8) + _u64(0)),
            ("x", _u32(ARRAY) + _u32(UINT8) + _u64(huge)),
            ("x", _u32(ARRAY) + _u32(STRING) + _u64(huge)),
            ("x", _u32(ARRAY) + _u32(ARRAY) + _u64(huge)),
            ("x", _u32(ARRAY) + _u32(UINT8) + _u64(2**12) + bytes(2**12)),
            ("x", _u32(STRING) + _u64(huge)),
            ("general.alignment", _u32(4) + _u32(rng.choice([0, 1, 3, 64, 2**31]))),
            ("general.architecture", _u32(UINT8) + b"\7"),
            ("llama.expert_count", _u32(4) + _u32(8)),
        ]
    )
    pad = -(8 + len(label) + len(value)) % 32  # what follows stays aligned
    text = label.encode() + (b"y" * pad if label == "x" else b"")
    content[START:START] = _u64(len(text)) + text + value
    count = int.from_bytes(content[16:24], "little") + 1
    content[16:24] = _u64(count)


def _u32(n: int) -> bytes:
    return n.to_bytes(4, "little")


def _u64(n: int) -> bytes:
    return n.to_bytes(8, "little")


EDITS: dict[str, Callable[[random.Random, bytearray], None]] = {
    "a number of the header": number,
    "a name or a text": name,
    "one more key": key,
}
