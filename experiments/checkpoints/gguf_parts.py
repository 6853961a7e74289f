"""Parts of a GGUF file that is being written: a description, then each tensor's bytes.

A part appears whole under its name or not at all, and carries its digest. Its tensors lie one
behind the other as in the file, so that the file is the parts' bytes behind its metadata.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from algorithms.tensors import QuantizedTensor
from experiments.checkpoints.gguf import PLAIN, permuted_heads, unpermute
from experiments.checkpoints.layouts import gguf_blocks
from experiments.files import sync
from models.config import DecoderConfig

Type = gguf.GGMLQuantizationType
SUFFIX = ".ggml"
ALIGNMENT = 32  # of each tensor's first byte, in a part as in the file
HEADER = 8  # bytes that say how long a part's description is


class Stored(NamedTuple):
    """A tensor as the file has it."""

    kind: Type
    shape: tuple[int, ...]
    data: np.ndarray  # uint8, a row for each row of a matrix
    dequantized: bool = False  # for want of a type that holds it as it is


class PartNote(NamedTuple):
    """What is known of a part that is whole: its digest and how its tensors are stored."""

    digest: str
    described: Mapping[str, Mapping[str, Any]]


class Part:
    """What one part holds, read back and compared with its digest."""

    def __init__(self, path: Path, permuted: DecoderConfig | None = None):
        """permuted: whose q and k have their rows interleaved. Raises ValueError or OSError if the
        file is not whole.
        """
        self._path, self._permuted = path, permuted
        with path.open("rb") as file:
            length = int.from_bytes(file.read(HEADER), "little")
            description = json.loads(file.read(min(length, path.stat().st_size)))
            self.note = PartNote(description["digest"], description["tensors"])
            self.start = HEADER + length + len(padding(HEADER + length))
            file.seek(self.start)
            chunks = iter(lambda: file.read(1 << 20), b"")
            if _digest(self.note.described, chunks) != self.note.digest:
                raise ValueError("its content does not match its digest")

    def tensor(self, name: str) -> np.ndarray | QuantizedTensor:
        """A dense array, or a grid of codes."""
        stored = self.note.described[name]
        shape, kind = stored["shape"], getattr(Type, stored["type"])
        data = np.fromfile(
            self._path, np.uint8, stored["bytes"], offset=self.start + stored["offset"]
        ).reshape(shape[0], -1)
        heads = None if self._permuted is None else permuted_heads(self._permuted, name)
        data = np.ascontiguousarray(data if heads is None else unpermute(data, heads))
        if kind in PLAIN:
            return data.view(PLAIN[kind]).reshape(shape)
        return gguf_blocks.decode(data, kind)


def save(path: Path, stored: Mapping[str, Stored]) -> PartNote:
    """A part, whole or not at all: a description, then each tensor's bytes."""
    described, offset = {}, 0
    for name, s in stored.items():
        described[name] = {
            "type": s.kind.name, "shape": list(s.shape), "offset": offset, "bytes": s.data.nbytes,
            "dequantized": s.dequantized,
        }  # fmt: skip
        offset += s.data.nbytes + len(padding(s.data.nbytes))
    chunks = [c for s in stored.values() for c in (s.data.tobytes(), padding(s.data.nbytes))]
    note = PartNote(_digest(described, chunks), described)
    text = json.dumps({"digest": note.digest, "tensors": described}).encode()
    unfinished = path.with_name(f".{path.stem}.tmp")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(HEADER, "little") + text + padding(HEADER + len(text)))
        file.writelines(chunks)
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)
    return note


def _digest(described: Mapping[str, Any], chunks: Iterable[bytes]) -> str:
    total = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def padding(n: int) -> bytes:
    """What fills up n bytes to a multiple of the alignment."""
    return bytes(-n % ALIGNMENT)
