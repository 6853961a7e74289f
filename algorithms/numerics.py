"""Uniform grids: their range, their scale and zero point, and rounding onto them.

A grid maps codes 0 … 2^b - 1 to scale (code - zero). Letters: o outputs, i inputs, c the columns of
one group.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerGrid:
    """A uniform grid of 2^bits points per group of `group_size` consecutive input columns.

    Symmetric grids put code 2^(bits-1) on zero and span [-m, m], m the group's largest magnitude,
    in 2^bits - 1 steps; asymmetric grids span [min(w, 0), max(w, 0)] with an integer zero point, so
    that zero is always on the grid.
    """

    bits: int = 4
    group_size: int | None = 64  # None: one group per row ("per channel")
    symmetric: bool = False
    scale_dtype: str | None = "float16"  # scales are rounded to it before codes are; None: w's own
    clip_search: bool = False  # shrink the range to the p in (0.2, 1] with least Σ|w - ŵ|^2.4

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be from 2 to 8.")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size={self.group_size} must be positive, or null for one group per row."
            )
        if self.scale_dtype not in (None, "float16", "bfloat16", "float32"):
            raise ValueError(
                f"scale_dtype={self.scale_dtype!r} must be float16, bfloat16, float32 or null."
            )

    def columns_per_group(self, w: Float[Array, "o i"]) -> int:
        """The group size for this weight; raises ValueError if it does not divide its columns."""
        if self.group_size is None:
            return w.shape[1]
        if w.shape[1] % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} must divide the input dimension of w, {w.shape=}."
            )
        return self.group_size

    def fit(self, w: Float[Array, "*g c"]) -> tuple[Float[Array, "*g"], Float[Array, "*g"]]:
        """Scale and zero point of each group, in w's dtype; the zero point is a whole number."""
        low, high = jnp.minimum(w.min(-1), 0), jnp.maximum(w.max(-1), 0)
        if self.symmetric:
            high = jnp.maximum(-low, high)
            low = -high
        empty = (low == 0) & (high == 0)
        low, high = jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)
        if not self.clip_search:
            return self._span(low, high)
        return self._search(w, low, high)

    def _span(self, low, high):
        scale = (high - low) / (2**self.bits - 1)
        if self.scale_dtype is not None:
            info = jnp.finfo(self.scale_dtype)
            stored = jnp.clip(scale, info.tiny, info.max).astype(self.scale_dtype)
            scale = stored.astype(scale.dtype)
        if self.symmetric:
            return scale, jnp.full_like(scale, 2 ** (self.bits - 1))
        return scale, jnp.round(-low / scale)

    def _search(self, w, low, high):
        """The official GPTQ code's `mse` option: 80 ranges p·[low, high], p = 1, 0.99, …, 0.21."""

        def try_range(best, step):
            p = (1 - step / 100).astype(w.dtype)
            scale, zero = self._span(p * low, p * high)
            rounded = self.dequantize(self.quantize(w, scale, zero), scale, zero)
            error = (jnp.abs(rounded - w) ** 2.4).sum(-1)
            better, found = error < best[0], (error, scale, zero)
            return [jnp.where(better, a, b) for a, b in zip(found, best, strict=True)], None

        first = [jnp.full_like(low, jnp.inf), low, low]
        (_, scale, zero), _ = lax.scan(try_range, first, jnp.arange(80))
        return scale, zero

    def quantize(
        self, w: Float[Array, "*g c"], scale: Float[Array, "*g"], zero: Float[Array, "*g"]
    ) -> Float[Array, "*g c"]:
        """The nearest code of each weight (ties to even), as a float."""
        codes = jnp.round(w / scale[..., None]) + zero[..., None]
        return jnp.clip(codes, 0, 2**self.bits - 1)

    def dequantize(
        self, codes: Float[Array, "*g c"], scale: Float[Array, "*g"], zero: Float[Array, "*g"]
    ) -> Float[Array, "*g c"]:
        return (codes - zero[..., None]) * scale[..., None]

    def stored(
        self, scale: Float[Array, "o g"], zero: Float[Array, "o g"]
    ) -> tuple[Float[Array, "o g"], UInt8[Array, "o g"] | None]:
        """Scale and zero point as a tensor keeps them: a symmetric zero point is implied."""
        scale = scale if self.scale_dtype is None else scale.astype(self.scale_dtype)
        return scale, None if self.symmetric else zero.astype(jnp.uint8)


def relative_error(part: Float[Array, ""], total: Float[Array, ""]) -> Float[Array, ""]:
    """part / total, where nothing of nothing is no error: a layer of zeros is kept exactly."""
    return jnp.where((part == 0) & (total == 0), 0.0, part / total)
