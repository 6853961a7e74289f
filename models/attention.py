"""Masked dot-product attention with grouped queries. B windows, T queries, S keys, k key-value
heads, g queries per key-value head, h head size."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128  # queries per step of `causal`: keys beyond a step's last query are never touched


def causal(
    q: Float[Array, "B T n h"],
    k: Float[Array, "B T k h"],
    v: Float[Array, "B T k h"],
    *,
    window: int | None,
) -> Float[Array, "B T n h"]:
    """Each position sees itself and what came before, at most `window` positions in all."""
    t = q.shape[1]
    steps = []
    for start in range(0, t, BLOCK):
        stop = min(start + BLOCK, t)
        first = 0 if window is None else max(0, start - window + 1)
        mask = visible(jnp.arange(start, stop), jnp.arange(first, stop), window)
        steps.append(attend(q[:, start:stop], k[:, first:stop], v[:, first:stop], mask[None]))
    return jnp.concatenate(steps, axis=1)


def cached(
    q: Float[Array, "B T n h"],
    k: Float[Array, "B S k h"],
    v: Float[Array, "B S k h"],
    positions: Int[Array, "B T"],
    *,
    window: int | None,
) -> Float[Array, "B T n h"]:
    """Queries at `positions` over a cache whose slot s holds position s."""
    mask = visible(positions, jnp.arange(k.shape[1])[None], window)
    return attend(q, k, v, mask)


def visible(
    queries: Int[Array, "*B T"], keys: Int[Array, "*b S"], window: int | None
) -> Bool[Array, "*B T S"]:
    """Which key positions each query position may see."""
    distance = queries[..., :, None] - keys[..., None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attend(
    q: Float[Array, "B T n h"],
    k: Float[Array, "B S k h"],
    v: Float[Array, "B S k h"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B T n h"]:
    """softmax(q kᵀ / √h) v under the mask, the softmax in float32."""
    b, t, n, h = q.shape
    q = q.reshape(b, t, k.shape[2], n // k.shape[2], h) * h**-0.5
    scores = jnp.einsum("BTkgh,BSkh->BkgTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BkgTS,BSkh->BTkgh", p, v).reshape(b, t, n, h)
