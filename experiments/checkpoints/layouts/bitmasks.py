"""Pruned weights as compressed-tensors kept them up to its version 0.14: a bit for each entry.

    what                        format               arrays of a layer
    numbers or codes            sparse-bitmask       shape, compressed [n], bitmask, row_offsets
    so, 2 of each 4             sparse-24-bitmask    shape, compressed [o, i / 2], bitmask

Facts, of compressed-tensors at the parent of 927f6d5, which removed both (compressors/
sparse_compressors/*.py, utils/helpers.py):
- A bit is 1 where there is an entry, the first in the lowest bit of a row's first byte; entries
  follow one another row by row. `row_offsets` are how many come before each row.
- `shape` is a vector, of the second format a column.
- They replace an array called `weight`, so codes too where those have that name: W8A8 of 2:4.
- One `sparsity_config` says the format of all layers that it names.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from algorithms.tensors import (
    BlockSparseTensor,
    CompressedTensor,
    DenseTensor,
    QuantizedTensor,
    SparseTensor,
)
from algorithms.tensors.block_sparse import sparse_blocks
from experiments.checkpoints.layouts import codes
from experiments.checkpoints.layouts.base import Arrays, Scheme
from kernels import packing

ANY, TWO_OF_FOUR = "sparse-bitmask", "sparse-24-bitmask"
FORMATS = (ANY, TWO_OF_FOUR)
STRUCTURES = {ANY: "unstructured", TWO_OF_FOUR: "2:4"}
FIELDS = ("compressed", "bitmask", "shape", "row_offsets")
FLOATS = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))


def scheme_of(tensor: CompressedTensor) -> dict[str, Any] | None:
    """Of weights without their zeros, whose values are numbers; None for others."""
    if isinstance(tensor, SparseTensor):
        if tensor.element is None:
            return _scheme(ANY)
    elif isinstance(tensor, BlockSparseTensor) and isinstance(tensor.values, DenseTensor):
        return _scheme(TWO_OF_FOUR if (tensor.keep, tensor.of) == (2, 4) else ANY)
    return None


def _scheme(format: str) -> dict[str, Any]:
    return {"format": format, "weights": None, "input_activations": None}


def encode(tensor: CompressedTensor, scheme: Scheme) -> dict[str, np.ndarray]:
    """Its arrays by name."""
    assert isinstance(tensor, SparseTensor | BlockSparseTensor)
    alive, shape = np.asarray(tensor.alive()), np.array(tensor.shape, np.int64)
    values = tensor.values.weight if isinstance(tensor.values, DenseTensor) else tensor.values
    found = {"bitmask": np.packbits(alive, axis=-1, bitorder="little")}
    if scheme["format"] == TWO_OF_FOUR:
        return found | {"shape": shape.reshape(2, 1), "compressed": np.asarray(values)}
    counts = alive.sum(-1, dtype=np.int64)
    return found | {
        "shape": shape,
        "compressed": np.asarray(values).reshape(-1),
        "row_offsets": np.cumsum(counts) - counts,
    }


def decode(arrays: Arrays, scheme: Scheme) -> CompressedTensor:
    """The tensor again; raises ValueError for arrays that do not fit."""
    alive, values = _read(arrays, scheme["format"])
    if values.dtype not in FLOATS:
        raise ValueError(f"compressed is {values.dtype} where a float of 16 or 32 bits is read")
    if not np.isfinite(values.astype(np.float32)).all():
        raise ValueError("compressed holds NaN or infinity")
    return _without_zeros(jnp.asarray(_spread(alive, values)), alive, scheme["format"])


def spread(arrays: Arrays, format: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A layer of codes with its `weight` in the place of what this format made of it, zeros where
    there was nothing, and where there was something.
    """
    alive, values = _read(arrays, format)
    rest = {name: x for name, x in arrays.items() if name not in FIELDS}
    return rest | {"weight": _spread(alive, values)}, alive


def kept(tensor: QuantizedTensor, alive: np.ndarray, format: str) -> CompressedTensor:
    """Its codes without those of zeros; all of them where zero is a code of each group's own."""
    return tensor if tensor.zero is not None else _without_zeros(tensor, alive, format)


def _read(arrays: Arrays, format: str) -> tuple[np.ndarray, np.ndarray]:
    """Which entries there are [o, i], and their values [n]."""
    shape = codes.array(arrays, "shape", np.int64).reshape(-1)
    if shape.shape != (2,) or shape.min() < 1:
        raise ValueError(f"shape {shape.tolist()} is not that of a matrix")
    o, i = (int(n) for n in shape)
    bits = codes.array(arrays, "bitmask", np.uint8)
    if bits.shape != (o, packing.packed_width(i, 1)):
        raise ValueError(f"bitmask has shape {bits.shape}, which is not a bit for each of {o, i}")
    alive = np.unpackbits(bits, axis=-1, count=i, bitorder="little").astype(bool)
    values = codes.array(arrays, "compressed").reshape(-1)
    if values.size != (count := int(alive.sum())):
        raise ValueError(f"compressed has {values.size} entries where bitmask has {count}")
    if format == TWO_OF_FOUR:
        if i % 4 or (alive.reshape(o, -1, 4).sum(-1) != 2).any():
            raise ValueError("bitmask has not 2 of each 4 entries of a row")
    else:
        counts, offsets = alive.sum(-1), codes.array(arrays, "row_offsets").reshape(-1)
        if not np.array_equal(offsets, np.cumsum(counts) - counts):
            raise ValueError("row_offsets are not where the rows of bitmask begin")
    return alive, values


def _spread(alive: np.ndarray, values: np.ndarray) -> np.ndarray:
    w = np.zeros(alive.shape, values.dtype)
    w[alive] = values
    return w


def _without_zeros(w: Any, alive: np.ndarray, format: str) -> CompressedTensor:
    mask, dtype = jnp.asarray(alive), getattr(w, "dtype", jnp.float32)  # of numbers
    if format == TWO_OF_FOUR:
        return sparse_blocks(w, mask, 2, 4, dtype=dtype)
    counts = alive.sum(-1)
    of_row = int(counts[0]) if (counts == counts[0]).all() else None
    return SparseTensor.of(w, mask, int(alive.sum()), row_count=of_row, dtype=dtype)


def describe(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The sparsity_config of those layers that are stored so; {} if none are. Raises ValueError,
    one sentence, for layers of both formats.
    """
    named = {name: s["format"] for name, s in schemes.items() if s and s["format"] in FORMATS}
    formats = sorted(set(named.values()))
    if len(formats) > 1:
        raise ValueError(
            f"compressed-tensors keeps all sparse layers of a model as {formats[0]} or all as "
            f"{formats[1]}, and these are of both: prune all layers to 2:4, or none."
        )
    if not formats:
        return {}
    return {
        "sparsity_config": {
            "format": formats[0], "targets": list(named), "ignore": [],
            "sparsity_structure": STRUCTURES[formats[0]],
        }
    }  # fmt: skip


def parse(description: Mapping[str, Any]) -> tuple[str | None, Iterable[str], Iterable[str]]:
    """How sparse layers are kept, which are, and which of those are not; None: none are."""
    said = description.get("sparsity_config") or {}
    format = said.get("format", "dense")
    if format == "dense":
        return None, (), ()
    if format not in FORMATS:
        raise ValueError(f"its weights are stored sparse ({format}), which is not read")
    return format, said.get("targets") or [], said.get("ignore") or []


def scheme(format: str, quantized: Scheme | None) -> Scheme:
    """Of a layer that is kept so, on top of how its codes are, if it has any."""
    return _scheme(format) if quantized is None else {**quantized, "sparsity": format}
