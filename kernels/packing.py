"""Codes of 1 to 8 bits packed into bytes: one little-endian bit stream along the last axis.

Code c occupies bits c·b to (c+1)·b - 1 of its row, so 8 codes fill exactly b bytes, two 4-bit codes
share a byte with the first in the low half, and four bytes read as a little-endian int32 hold what
GPTQ's and compressed-tensors' int32 layouts hold for 2, 4 and 8 bits. A row is padded with zero
codes to a multiple of 8.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, UInt8


def packed_width(columns: int, bits: int) -> int:
    """Bytes per row of `columns` codes."""
    return -(-columns // 8) * bits


def _word(bits: int) -> tuple[int, int]:
    """The smallest whole number of codes that fills whole bytes: (codes, bytes)."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def pack(codes: UInt8[Array, "*r i"], bits: int) -> UInt8[Array, "*r b"]:
    """Pack unsigned codes below 2^bits."""
    *rows, columns = codes.shape
    codes = jnp.pad(codes, [(0, 0)] * len(rows) + [(0, -columns % 8)])
    count, width = _word(bits)
    words = codes.reshape(*rows, -1, count)
    packed = [jnp.zeros(words.shape[:-1], jnp.uint8) for _ in range(width)]
    for c in range(count):
        byte, shift = divmod(c * bits, 8)
        packed[byte] |= words[..., c] << shift
        if shift + bits > 8:
            packed[byte + 1] |= words[..., c] >> (8 - shift)
    return jnp.stack(packed, -1).reshape(*rows, packed_width(columns, bits))


def unpack(packed: UInt8[Array, "*r b"], bits: int, columns: int) -> UInt8[Array, "*r i"]:
    """The first `columns` codes of each row."""
    *rows, width = packed.shape
    if width != packed_width(columns, bits):
        raise ValueError(f"{columns} codes of bits={bits} do not fill packed.shape={packed.shape}.")
    return jnp.stack(planes(packed, bits), -1).reshape(*rows, -1)[..., :columns]


def codes_together(bits: int) -> int:
    """The fewest codes that fill whole bytes."""
    return _word(bits)[0]


def planes(packed: UInt8[Array, "*r b"], bits: int) -> list[UInt8[Array, "*r n"]]:
    """The first of every `codes_together(bits)` codes of each row, the second, and so on, padding
    included: what arithmetic on whole arrays reads out of them.
    """
    *rows, _ = packed.shape
    count, size = _word(bits)
    words = packed.reshape(*rows, -1, size)
    codes = []
    for c in range(count):
        byte, shift = divmod(c * bits, 8)
        code = words[..., byte] >> shift
        if shift + bits > 8:
            code |= words[..., byte + 1] << (8 - shift)
        codes.append(code & (2**bits - 1))
    return codes
