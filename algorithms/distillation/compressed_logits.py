"""What codecs of a teacher's logits share: entries of the vocabulary in as few bits as they need,
and the interface.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt16

from kernels import packing


class LogitCodec(NamedTuple):
    """A teacher's logits as few bytes, to be stored once and read in every epoch.

    encode(logits [*m V]), and with a PRNG key as second argument if it is `seeded`, gives a pytree
    of arrays [*m ...]; decode(it, vocabulary) gives logits [*m V] that any divergence takes;
    per_token(student's logits, it) is the forward KL that needs no decoding.
    """

    encode: Callable[..., Any]
    decode: Callable[[Any, int], Float[Array, "*m V"]]
    per_token: Callable[[Float[Array, "*m V"], Any], Float[Array, "*m"]]
    bytes_per_token: Callable[[int], int]  # of a vocabulary
    seeded: bool = False


class Entries(NamedTuple):
    """Entries of the vocabulary: the lower 16 bits, and the others packed, if there are others."""

    low: UInt16[Array, "*m k"]
    high: UInt8[Array, "*m b"] | None


def pack_entries(entries: Int[Array, "*m k"], vocabulary: int) -> Entries:
    bits = _high_bits(vocabulary)
    low = (entries & 0xFFFF).astype(jnp.uint16)
    high = packing.pack((entries >> 16).astype(jnp.uint8), bits) if bits else None
    return Entries(low, high)


def unpack_entries(packed: Entries, vocabulary: int) -> Int[Array, "*m k"]:
    entries = packed.low.astype(jnp.int32)
    if packed.high is None:
        return entries
    high = packing.unpack(packed.high, _high_bits(vocabulary), entries.shape[-1])
    return entries | high.astype(jnp.int32) << 16


def _high_bits(vocabulary: int) -> int:
    """Of an entry, above the lower 16; what can be packed has at least 2."""
    if vocabulary > 1 << 24:
        raise ValueError(f"vocabulary={vocabulary} must be at most {1 << 24}.")
    bits = (vocabulary - 1).bit_length() - 16
    return max(bits, 2) if bits > 0 else 0


def bytes_of_token(tree: Any) -> int:
    """Of arrays [1, ...] or their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
