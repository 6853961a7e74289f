"""Small numerical conventions that several parts share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

ROWS = 512  # of a matrix that is worked on in parts: enough for products to be as fast


def relative_error(part: Float[Array, ""], total: Float[Array, ""]) -> Float[Array, ""]:
    """part / total, where nothing of nothing is no error: a layer of zeros is kept exactly."""
    return jnp.where((part == 0) & (total == 0), 0.0, part / total)


def widened(x: Float[Array, "*m"]) -> Float[Array, "*m"]:
    """x in float32, or in its own type if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def running_count(mask: Bool[Array, "*b n"]) -> Int[Array, "*b n"]:
    """How many there are up to each, itself counted: a cumulative sum by doubling (Hillis, Steele,
    CACM 1986), one small loop where XLA's own unrolls a tree that takes seconds to compile.
    """
    counts = mask.astype(jnp.int32)
    n, before = mask.shape[-1], jnp.zeros_like(counts)

    def doubled(step, counts):
        reach = jnp.left_shift(1, step)
        both = jnp.concatenate([before, counts], -1)
        return counts + lax.dynamic_slice_in_dim(both, n - reach, n, axis=-1)

    return lax.fori_loop(0, max(n - 1, 0).bit_length(), doubled, counts)


def sum_over_rows(
    of_row: Callable[..., Float[Array, "*k"]], *matrices: Float[Array, "o i"]
) -> Float[Array, "*k"]:
    """Σ of_row(a[r], b[r], …), some rows at a time: intermediates as large as a weight would be
    the most that compressing it holds.
    """
    return jnp.sum(lax.map(lambda rows: of_row(*rows), matrices, batch_size=ROWS), axis=0)


@jax.custom_jvp
def through(x: Array, value: Array) -> Array:
    """`value`, with the gradient of `x`: how rounding is passed (Bengio, Léonard, Courville,
    arXiv:1308.3432).
    """
    return value


@through.defjvp
def _through_jvp(primals, tangents):
    return primals[1], tangents[0]
