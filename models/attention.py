"""Masked dot-product attention with grouped queries. B windows, T queries, S keys, n query heads,
k key-value heads, h head size."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128  # queries per step of `blockwise`: keys beyond a step's last query are never touched


def causal(
    q: Float[Array, "B T n h"],
    k: Float[Array, "B T k h"],
    v: Float[Array, "B T k h"],
    *,
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "B T n h"]:
    """Each position sees itself and what came before, at most `window` positions in all.

    scale: of q kᵀ; None: 1/√h. cap: scores are cap tanh(score / cap).
    """

    def blocks(q, k, v):
        return blockwise(q, k, v, window=window, scale=scale, cap=cap)

    if cap is not None:  # which JAX's own does not have
        return blocks(q, k, v)
    return lax.platform_dependent(
        q, k, v, cpu=blocks, default=lambda q, k, v: fused(q, k, v, window=window, scale=scale)
    )


def everywhere(
    q: Float[Array, "B T n h"],
    k: Float[Array, "B T k h"],
    v: Float[Array, "B T k h"],
    *,
    scale: float | None = None,
) -> Float[Array, "B T n h"]:
    """Each position sees all of its window."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale)


def fused(
    q: Float[Array, "B T n h"],
    k: Float[Array, "B T k h"],
    v: Float[Array, "B T k h"],
    *,
    window: int | None,
    scale: float | None = None,
) -> Float[Array, "B T n h"]:
    """JAX's own attention, which an accelerator's library fuses."""
    span = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=span, scale=scale
    )


def blockwise(
    q: Float[Array, "B T n h"],
    k: Float[Array, "B T k h"],
    v: Float[Array, "B T k h"],
    *,
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "B T n h"]:
    """Every head of every window as one batch of matrices, in blocks of queries.

    On a CPU this takes a fraction of the time of `fused`: the products run at the machine's rate,
    and keys that the mask hides from a whole block are not touched.
    """
    q, k, v = lax.optimization_barrier((q, k, v))  # fused into the transposes below, rope is slow
    b, t, n, h = q.shape
    heads = k.shape[2]
    g = n // heads  # query heads per key-value head: rows are ordered (position, query head)
    rows = q.reshape(b, t, heads, g, h).swapaxes(1, 2).reshape(b * heads, t * g, h)
    rows = rows * (h**-0.5 if scale is None else scale)
    keys = k.transpose(0, 2, 3, 1).reshape(b * heads, h, t)
    values = v.swapaxes(1, 2).reshape(b * heads, t, h)

    steps = []
    for start in range(0, t, BLOCK):
        stop = min(start + BLOCK, t)
        first = 0 if window is None else max(0, start - window + 1)
        mask = visible(jnp.arange(start, stop), jnp.arange(first, stop), window)
        scores = (rows[:, start * g : stop * g] @ keys[:, :, first:stop]).astype(jnp.float32)
        p = jnp.where(jnp.repeat(mask, g, 0), capped(scores, cap), -jnp.inf)
        p = jnp.exp(p - p.max(-1, keepdims=True))
        y = p.astype(values.dtype) @ values[:, first:stop]
        steps.append(y / p.sum(-1, keepdims=True).astype(y.dtype))
    y = jnp.concatenate(steps, 1)
    return y.reshape(b, heads, t, g, h).swapaxes(1, 2).reshape(b, t, n, h)


def capped(scores: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Scores, or logits, kept within ±cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def cached(
    q: Float[Array, "B T n h"],
    k: Float[Array, "B S k h"],
    v: Float[Array, "B S k h"],
    positions: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "B T n h"]:
    """Queries at `positions` over a cache whose slot s holds position s."""
    mask = visible(positions, jnp.arange(k.shape[1])[None], window)[:, None]  # B 1 T S
    if cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, h) * (h**-0.5 if scale is None else scale)
    scores = jnp.einsum("BTkgh,BSkh->BkgTS", grouped, k).astype(jnp.float32)
    p = jax.nn.softmax(jnp.where(mask[:, None], capped(scores, cap), -jnp.inf)).astype(v.dtype)
    return jnp.einsum("BkgTS,BSkh->BTkgh", p, v).reshape(b, t, n, h)


def visible(
    queries: Int[Array, "*B T"], keys: Int[Array, "*b S"], window: int | None
) -> Bool[Array, "*B T S"]:
    """Which key positions each query position may see."""
    distance = queries[..., :, None] - keys[..., None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
