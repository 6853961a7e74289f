"""Arrays of servers' formats: codes in words and bytes, signed and not, with what is wrong said.

Complaints are clauses without a full stop: who knows the file and the layer makes the sentence.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels import packing


def array(arrays: Mapping[str, np.ndarray], name: str, dtype: Any = None) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"{name} is missing")
    if dtype is not None and arrays[name].dtype != dtype:
        raise ValueError(f"{name} is {arrays[name].dtype} where {np.dtype(dtype)} is expected")
    return arrays[name]


def one(arrays: Mapping[str, np.ndarray], name: str, dtype: Any = None) -> np.ndarray:
    """One number, as it is stored."""
    x = array(arrays, name, dtype)
    if x.size != 1 or not np.isfinite(x.astype(np.float32)).all():
        raise ValueError(f"{name} is not one finite number")
    return x.reshape(())


def shaped(x: np.ndarray, name: str, shape: tuple[int, int]) -> np.ndarray:
    if x.size != shape[0] * shape[1] or x.ndim == 2 and x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape} where {shape} is expected")
    return x.reshape(shape)


def words(packed: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """int32 words of rows of codes that we packed into bytes."""
    width = -(-columns * bits // 32) * 4
    packed = np.pad(packed, [(0, 0), (0, max(0, width - packed.shape[1]))])[:, :width]
    return np.ascontiguousarray(packed).view("<i4")


def packed_bytes(words: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """And back. What follows the last code is made zero, as we have it."""
    packed, width = np.ascontiguousarray(words).view(np.uint8), packing.packed_width(columns, bits)
    packed = np.pad(packed, [(0, 0), (0, max(0, width - packed.shape[1]))])[:, :width]
    codes = packing.unpack(jnp.asarray(packed), bits, columns)
    return np.asarray(packing.pack(codes, bits))


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def unsigned(signed: np.ndarray, bits: int) -> np.ndarray:
    codes = signed.astype(np.int16) + 2 ** (bits - 1)
    if codes.min(initial=0) < 0 or codes.max(initial=0) >= 2**bits:
        raise ValueError(f"codes from {signed.min()} to {signed.max()} do not fit {bits} bits")
    return codes.astype(np.uint8)
