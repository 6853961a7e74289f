"""Scales moved onto scores and probabilities, so that codes go into the products: what XLA fuses.

Dequantizing first writes the whole cache as floats. Signed codes of 4 bits go into a product on a
GPU as they lie in memory; unsigned ones would be copied as 8. XLA has no product on a GPU over
heads that lie between places and channels, and copies the cache to move them. There, queries are
laid out over the channels of all heads, zeros but at their own, and the products take a place's row
whole: their rows are too few to fill a tensor core's either way. What is not finite in a cache then
shows in every head of its sequence.
"""

import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.decode_attention.reference import probabilities, visible


def decode_attention(
    q, k, v, lengths, k_scale, v_scale, *, kind, window, scale, cap, rows_whole=None
):
    """rows_whole: whether products take all heads of a place at once; None: not on a CPU."""
    if rows_whole is None:
        rows_whole = dispatch.device().platform != "cpu"
    (b, n, h), heads = q.shape, k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    of_keys, of_values = (_whole_keys, _whole_values) if rows_whole else (_keys, _values)
    grouped = q.reshape(b, heads, n // heads, h)

    k, v = (_codes(x, kind, h).astype(q.dtype) for x in (k, v))
    scores = of_keys(grouped, k, wide) * scale * _over_places(k_scale, wide)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    p = probabilities(scores, visible(lengths, k.shape[1], window)[:, None, None])
    p = (p * _over_places(v_scale, wide)).astype(q.dtype)
    return of_values(p, v, wide).reshape(b, n, h).astype(q.dtype)


def _codes(x, kind, h):
    if kind != "int4":
        return x
    return lax.bitcast_convert_type(x, jnp.int4).reshape(*x.shape[:-1], -1)[..., :h]


def _keys(q, k, wide):
    return jnp.einsum("bkgh,bskh->bkgs", q, k, preferred_element_type=wide)


def _values(p, v, wide):
    return jnp.einsum("bkgs,bskh->bkgh", p, v, preferred_element_type=wide)


def _whole_keys(q, k, wide):
    b, heads, g, h = q.shape
    own = jnp.eye(heads, dtype=bool)[:, None, :, None]
    q = jnp.where(own, q[:, :, :, None], 0).reshape(b, heads * g, heads * h)
    scores = jnp.einsum("bqc,bsc->bqs", q, k.reshape(*k.shape[:2], -1), preferred_element_type=wide)
    return scores.reshape(b, heads, g, -1)


def _whole_values(p, v, wide):
    (b, heads, g, s), h = p.shape, v.shape[-1]
    y = jnp.einsum(
        "bqs,bsc->bqc", p.reshape(b, heads * g, s), v.reshape(b, s, -1), preferred_element_type=wide
    )
    own = jnp.eye(heads, dtype=bool)[:, None, :, None]
    return jnp.where(own, y.reshape(b, heads, g, heads, h), 0).sum(3)


def _over_places(scale, dtype):
    """A scale as it stands beside scores [B, heads, queries, S]; 1 for none."""
    if scale is None:
        return 1
    scale = scale.astype(dtype)
    return scale if scale.ndim == 1 else jnp.moveaxis(scale, 1, 2)[:, :, None]
