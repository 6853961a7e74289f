"""8-bit Optimizers via Block-wise Quantization. Dettmers, Lewis, Shleifer, Zettlemoyer, ICLR 2022,
arXiv:2110.02861.

Between steps, each float of an optimizer's state is one byte: the nearest entry of a map of 256
values in [-1, 1], times the largest magnitude of its block of 256. The map is dynamic (§2.1): entry
ranges [10^-(6-i)/10, 10^-(6-i)], i = 0 … 6, are cut into 2^i pieces (2^(i+1) where nothing is
negative), whose means are its values, and 0 and 1 are among them.

What a step computes is computed in float32, on decoded states.

This differs from bitsandbytes in:
1. Weight decay is where the wrapped optimizer has it: before the step, not after.
2. Moments that cannot be negative are recognized by their field's name in the state.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from algorithms.optimizers.iterates import wide

BLOCK = 256


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values, in order."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=np.float32)
        means = np.float32(10.0 ** (i - 6)) * (edges[:-1] + edges[1:]) / 2
        values += [*means, *(-means if signed else [])]
    return np.sort(np.array(values, np.float32))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("codes", "absmax"), meta_fields=("signed",)
)
@dataclasses.dataclass(frozen=True)
class EightBit:
    """A float array in 8 bits."""

    # A pytree's leaves are not always arrays: they may be shapes, or shardings.
    codes: Any  # UInt8[Array, "*shape"]
    absmax: Any  # Float[Array, "blocks"], of each 256 consecutive elements; the last may be fewer
    signed: bool

    def decode(self) -> Float[Array, "*shape"]:
        values = jnp.asarray(dynamic_map(self.signed))[self.codes].reshape(-1)
        spread = jnp.repeat(self.absmax, BLOCK)[: values.size]
        return (values * spread).reshape(self.codes.shape)


def encode(x: Float[Array, "*shape"], *, signed: bool) -> EightBit:
    """The nearest value of the map for each element; what is negative stays so."""
    flat = x.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.abs(blocks).max(1)
    unit = blocks / jnp.where(absmax > 0, absmax, 1)[:, None]
    codes = nearest(unit, signed)
    if signed:
        zero = int(np.searchsorted(dynamic_map(signed), 0))
        codes = codes - ((unit < 0) & (codes == zero)).astype(jnp.uint8)
    return EightBit(codes.reshape(-1)[: flat.size].reshape(x.shape), absmax, signed)


def nearest(x: Float[Array, "*shape"], signed: bool) -> UInt8[Array, "*shape"]:
    """The code of the value nearest to each float32: found in a table, by the upper half of its
    bits, and settled by one comparison. A binary search takes 14 times as long on a CPU.
    """
    upper = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16
    low = jnp.asarray(_lowest_codes(signed))[upper]
    above = jnp.asarray(np.append(_borders(signed), np.inf))[low]
    return low + (x > above).astype(jnp.uint8)


@functools.cache
def _borders(signed: bool) -> np.ndarray:
    """Half way between values."""
    values = dynamic_map(signed)
    return (values[:-1] + values[1:]) / 2


@functools.cache
def _lowest_codes(signed: bool) -> np.ndarray:
    """Of the least of all floats that share their upper 16 bits, by these. There is a border or
    none between them.
    """
    upper = np.arange(2**16, dtype=np.uint32)
    least = (upper << 16) | np.where(upper < 2**15, 0, 2**16 - 1).astype(np.uint32)
    return np.searchsorted(_borders(signed), least.view(np.float32)).astype(np.uint8)


class EightBitState(NamedTuple):
    """The wrapped optimizer's state, with EightBit in place of its large leaves of floats."""

    inner: optax.OptState


def eight_bit(
    inner: optax.GradientTransformation,
    *,
    smallest: int = 4096,
    unsigned: Sequence[str] = ("nu", "v", "v_row", "v_col"),
) -> optax.GradientTransformationExtraArgs:
    """`inner`, with its state in 8 bits between steps.

    smallest: leaves of fewer elements stay floats. unsigned: the fields of optax's states in which
    nothing is negative.
    """
    inner = optax.with_extra_args_support(inner)

    def encoded(path: tuple[Any, ...], leaf: Array) -> Array | EightBit:
        if leaf.size < smallest or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        fields = {key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)}
        return encode(leaf, signed=fields.isdisjoint(unsigned))

    def stored(state: optax.OptState) -> EightBitState:
        return EightBitState(jax.tree_util.tree_map_with_path(encoded, state))

    def init(params: optax.Params) -> EightBitState:
        return stored(inner.init(wide(params)))

    def update(
        updates: optax.Updates,
        state: EightBitState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, EightBitState]:
        decoded = jax.tree.map(
            lambda x: x.decode() if isinstance(x, EightBit) else x,
            state.inner, is_leaf=lambda x: isinstance(x, EightBit),
        )  # fmt: skip
        seen = None if params is None else wide(params)
        moves, inner_state = inner.update(wide(updates), decoded, seen, **extra)
        like = updates if params is None else params
        return optax.tree.cast_like(moves, like), stored(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    smallest: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with its moments in 8 bits."""
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    return eight_bit(adamw, smallest=smallest)
