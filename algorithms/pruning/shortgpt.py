"""ShortGPT. Men, Xu, Zhang, Yuan, Wang, Lin, Lu, Han, Chen, "ShortGPT: Layers in Large Language
Models are More Redundant Than You Expect", Findings of ACL 2025, arXiv:2403.03853. Notes:
papers/shortgpt.md.

A block that gives much the same as it gets may go. With X the residual stream before a block and Y
behind it, over tokens t, its influence is
    BI = 1 - E_t[ X_t · Y_t / (‖X_t‖ ‖Y_t‖) ]
and the blocks with the lowest go.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

UNKNOWN = 0.5  # the similarity to a state that is zero, as the code that ours is compared with has


class Similarity(NamedTuple):
    """Of the tokens seen so far."""

    total: Float[Array, ""]
    tokens: Float[Array, ""]


def observe(x: Float[Array, "*m D"], y: Float[Array, "*m D"]) -> Similarity:
    """Of what enters a block with what leaves it, token by token."""
    x, y = (z.reshape(-1, z.shape[-1]).astype(jnp.float32) for z in (x, y))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    found = jnp.sum(x * y, -1) / jnp.where(norms > 0, norms, 1)
    found = jnp.where(norms > 0, found, UNKNOWN)
    return Similarity(found.sum(), jnp.asarray(found.size, jnp.float32))


def block_influence(seen: Similarity) -> Float[Array, ""]:
    """BI."""
    return 1 - seen.total / seen.tokens
