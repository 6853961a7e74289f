"""Tensors in safetensors files, memory-mapped: one file, or shards with an index.

A file is eight bytes of header length (little-endian), a JSON header that gives each tensor's
type, shape and byte range, and the bytes (huggingface/safetensors, format). The header is read
here rather than by the library, whose NumPy side has no bfloat16; every range is checked against
the file before anything is mapped. It is written here too: the library writes several metadata in
no fixed order.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from experiments.errors import UserError
from experiments.files import sync
from experiments.untrusted import parse_json, read_text, refusing, require_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}  # of weights
STORAGE = {**TYPES, "F64": np.float64, "U8": np.uint8, "I8": np.int8, "I32": np.int32}
STORAGE |= {"U16": np.uint16, "I16": np.int16, "BOOL": np.bool_, "I64": np.int64}
STORAGE |= {"F8_E4M3": ml_dtypes.float8_e4m3fn}
# Tensors in a file are in this order of their types, the last first, as the library has them.
ORDER = ("BOOL", "U8", "I8", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "F32", "F64", "I64")
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies, without its bytes."""

    file: Path
    storage: str  # the format's name of the type
    shape: tuple[int, ...]
    start: int  # in bytes, from the beginning of the file
    stop: int

    def open(self) -> np.ndarray:
        """The tensor as a read-only view of the file."""
        if self.start == self.stop:  # which cannot be mapped
            return np.zeros(self.shape, STORAGE[self.storage])
        raw = np.memmap(self.file, np.uint8, "r", self.start, self.stop - self.start)
        return raw.view(STORAGE[self.storage]).reshape(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's tensors, by name.

    Raises UserError if there are none, one is missing, or the index names a path outside.
    """
    if (folder / INDEX).exists():
        return [_inside(folder, name) for name in sorted(_shard_names(folder / INDEX))]
    if not (folder / SINGLE).exists():
        raise UserError(
            f"There is neither {SINGLE} nor {INDEX} in {folder}: planish reads safetensors only, "
            "so save the model's weights in that format."
        )
    return [require_file(folder / SINGLE, folder)]


def _shard_names(index: Path) -> set[str]:
    with refusing(f"{index} is not an index of safetensors"):
        names = set(parse_json(read_text(index, index.parent))["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("its weight_map names no files")
        return names


def _inside(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name)  # the name alone decides: caches link files from elsewhere
    if len(name) > 255 or parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
        raise UserError(
            f"{folder / INDEX} names the file {name!r}, which lies outside its folder: do not "
            "trust this model."
        )
    if not os.path.lexists(folder / parts):
        raise UserError(f"{folder} lacks the file {name} that its index names: fetch it again.")
    return require_file(folder / parts, folder)


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder, by the file's own names; headers alone are read."""
    entries: dict[str, Entry] = {}
    for file in weight_files(folder):
        entries |= read_header(file)
    return entries


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises UserError if it is truncated or corrupt."""
    with refusing(f"{file} is truncated or corrupt", "fetch the file again"):
        header, origin, size = _header(file)
        return _entries(file, header, origin, size)


def read_metadata(file: Path) -> dict[str, str]:
    """What a file says of itself. Raises UserError if it is truncated or corrupt."""
    with refusing(f"{file} is truncated or corrupt", "fetch the file again"):
        return dict(_header(file)[0]["__metadata__"])


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the tensors' bytes begin, and the size of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise ValueError(f"its {size} bytes end inside the header")
        return parse_json(stream.read(length)), 8 + length, size


def _entries(file: Path, header: dict[str, Any], origin: int, size: int) -> dict[str, Entry]:
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        (start, stop), shape = map(_whole, (info["data_offsets"], info["shape"]))
        _check_range(name, info["dtype"], shape, start, stop, size - origin)
        entries[name] = Entry(file, info["dtype"], shape, origin + start, origin + stop)
    _require_no_gaps(entries, origin, size)
    return entries


def _whole(numbers: Sequence[Any]) -> tuple[int, ...]:
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{numbers} are not all whole numbers")
    return tuple(numbers)


def _require_no_gaps(entries: Mapping[str, Entry], origin: int, size: int) -> None:
    """Each byte belongs to one tensor: the format has it so, and nothing else hides in a file."""
    ends = sorted((entry.start, entry.stop, name) for name, entry in entries.items())
    for (_, stop, _), (start, _, name) in zip([(0, origin, ""), *ends], ends, strict=False):
        if start != stop:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
    if max((stop for _, stop, _ in ends), default=origin) != size:
        raise ValueError("bytes follow the last tensor")


def _check_range(
    name: str, storage: str, shape: tuple[int, ...], start: int, stop: int, room: int
) -> None:
    if not start <= stop <= room:
        raise ValueError(f"{name} lies at bytes {start}:{stop} of {room}")
    if storage in STORAGE:
        needed = math.prod(shape) * np.dtype(STORAGE[storage]).itemsize
        if needed != stop - start:
            raise ValueError(f"{name} has {stop - start} bytes where its shape needs {needed}")


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write one file, whole or not at all: the bytes that the library writes, metadata in order."""
    names = {np.dtype(dtype): storage for storage, dtype in STORAGE.items()}
    kinds = {name: names[x.dtype] for name, x in arrays.items()}
    ordered = sorted(arrays, key=lambda name: (-ORDER.index(kinds[name]), name.encode()))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in ordered:
        start, end = end, end + arrays[name].nbytes
        shape = list(arrays[name].shape)
        header[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.stem}.tmp")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            # of no axis, NumPy would make one
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def require_readable(name: str, entry: Entry) -> None:
    """Refuse a storage type that planish does not read."""
    if entry.storage not in TYPES:
        raise UserError(
            f"{name} in {entry.file} is stored as {entry.storage} where planish reads "
            f"{', '.join(TYPES)}: save the model in one of those."
        )
