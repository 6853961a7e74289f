"""What decode_attention computes: the cache in full, then attention."""

import jax.numpy as jnp

from kernels.packing import unpack


def decode_attention(q, k, v, lengths, k_scale, v_scale, *, kind, window, scale, cap):
    (b, n, h), heads = q.shape, k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (values(x, s, kind, h, wide) for x, s in ((k, k_scale), (v, v_scale)))
    grouped = q.reshape(b, heads, n // heads, h).astype(wide) * scale
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, k, precision="highest")
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    seen = visible(lengths, k.shape[1], window)[:, None, None]
    p = probabilities(scores, seen)
    return jnp.einsum("bkgs,bskh->bkgh", p, v, precision="highest").reshape(b, n, h).astype(q.dtype)


def values(codes, scale, kind, h, dtype):
    """What the codes of keys or values stand for."""
    if kind == "int4":
        codes = (unpack(codes, 4, h) ^ 8).astype(dtype) - 8  # two's complement
    codes = codes.astype(dtype)
    if scale is None:
        return codes
    return codes * (scale if scale.ndim == 1 else scale[..., None]).astype(dtype)


def visible(lengths, s, window):
    """[B, S]: the places before a sequence's end, at most `window` of them."""
    places = jnp.arange(s, dtype=lengths.dtype)
    seen = places < lengths[:, None]
    return seen if window is None else seen & (places >= lengths[:, None] - window)


def probabilities(scores, seen):
    """Softmax over what is seen; zeros where nothing is."""
    scores = jnp.where(seen, scores, -jnp.inf)
    most = scores.max(-1, keepdims=True, initial=-jnp.inf, where=seen)
    p = jnp.where(seen, jnp.exp(scores - most), 0)
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(seen.any(-1, keepdims=True), total, 1)
