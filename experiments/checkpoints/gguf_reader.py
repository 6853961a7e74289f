"""The `gguf` package's reader, kept from believing what a damaged file says, and its metadata."""

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from experiments.errors import UserError
from experiments.untrusted import DAMAGE, LARGEST, explained, require_file

MOST_ITEMS = 2_000_000  # of metadata: the largest vocabularies come to a million


class _Reader(gguf.GGUFReader):
    """The package's reader, which takes a file at its word: a read beyond the file's end gives it
    nothing, so that a length of 2^60 is counted through. Here each is checked first.
    """

    def __init__(self, path: Path):
        self._items = 0
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it ends before what it describes")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        self._items += (count := int(length[0]))
        if self._items > MOST_ITEMS:
            raise ValueError(f"its metadata hold more than {MOST_ITEMS} values")
        own = gguf.GGUFValueType(kind[0])
        if own not in self.gguf_scalar_to_np:
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(orig_offs + 12, self.gguf_scalar_to_np[own], count)  # at once
        parts = [kind, length, *values.reshape(-1, 1)]
        return 12 + values.nbytes, parts, list(range(2, 2 + count)), [gguf.GGUFValueType.ARRAY, own]


def open_reader(path: Path) -> gguf.GGUFReader:
    """Map the file and read its metadata. Raises UserError if it is not GGUF, or is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an overflow while a damaged size is added up
            reader = _Reader(require_file(path))
    except (*DAMAGE, Warning) as error:
        raise UserError(
            f"{path} is not a GGUF file, or is truncated or corrupt ({explained(error)}): "
            "fetch it again."
        ) from error
    if reader.byte_order != "I":
        raise UserError(f"{path} has the byte order of another machine: convert it again on yours.")
    return reader


class Metadata:
    """The key-value pairs of a GGUF file; "{arch}" in a key stands for its architecture."""

    def __init__(self, reader: gguf.GGUFReader, path: Path):
        self.fields, self.path = reader.fields, path

    def architecture(self) -> str:
        return str(self.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value as Python's own type, or `default` where the key is missing."""
        if key.startswith("{arch}"):
            key = self.architecture() + key.removeprefix("{arch}")
        field = self.fields.get(key)
        try:
            return default if field is None else field.contents()
        except DAMAGE as error:
            raise UserError(
                f"{self.path} has an unreadable {key} ({explained(error)}): fetch it again."
            ) from error

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises UserError for anything else."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value <= LARGEST:
            name = key.replace("{arch}", self.architecture())
            raise UserError(
                f"{self.path} has {name}={value!r} where a positive whole number is expected: "
                "planish does not run such a model."
            )
        return value
