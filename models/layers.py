"""The parts of a decoder's block. B windows, T tokens, S places of a cache, D hidden, n heads, k
key-value heads, h head size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from kernels.decode_attention import decode_attention
from models import attention, rope
from models.config import Activation, CacheElement, DecoderConfig, Layer

STORED = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
RANGE: dict[CacheElement, tuple[float, float]] = {"fp8": (-448.0, 448.0), "int8": (-128.0, 127.0)}


class KVCache(NamedTuple):
    """Keys and values of one layer, or their codes: each sequence has its first `length` places."""

    k: Shaped[Array, "B S k h"]
    v: Shaped[Array, "B S k h"]
    length: Int[Array, " B"]


def empty_cache(config: DecoderConfig, layer: int, rows: int, room: int) -> KVCache:
    """Of one layer, for sequences of up to `room` places."""
    stored = jnp.float32 if config.cache is None else STORED[config.cache]
    heads = config.layer(layer).kv_heads  # none where there is no attention
    nothing = jnp.zeros((rows, room, heads, config.head_size), stored)
    return KVCache(nothing, jnp.zeros_like(nothing), jnp.zeros(rows, jnp.int32))


def append(cache: KVCache, k: Shaped[Array, "B T k h"], v: Shaped[Array, "B T k h"]) -> KVCache:
    """Write k and v behind the filled positions."""

    @jax.vmap
    def put(room: Shaped[Array, "S k h"], x: Shaped[Array, "T k h"], start: Int[Array, ""]):
        return jax.lax.dynamic_update_slice(room, x.astype(room.dtype), (start, 0, 0))

    return KVCache(
        put(cache.k, k, cache.length), put(cache.v, v, cache.length), cache.length + k.shape[1]
    )


def rounded(
    x: Float[Array, "B T k h"], scale: Float[Array, "1"], element: CacheElement
) -> Float[Array, "B T k h"]:
    """Keys or values as they come out of a cache of such elements; as they are where the scale is
    0.
    """
    y = decoded(encoded(x, scale, element), jnp.where(scale > 0, scale, 1))
    return jnp.where(scale > 0, y.astype(x.dtype), x)


def encoded(
    x: Float[Array, "B T k h"], scale: Float[Array, "1"], element: CacheElement
) -> Shaped[Array, "B T k h"]:
    """Keys or values as a cache of such elements keeps them."""
    y = jnp.clip(x.astype(jnp.float32) / jnp.where(scale > 0, scale, 1), *RANGE[element])
    return (y if element == "fp8" else jnp.round(y)).astype(STORED[element])


def decoded(codes: Shaped[Array, "B S k h"], scale: Float[Array, "1"]) -> Float[Array, "B S k h"]:
    return codes.astype(jnp.float32) * scale


def norm(config: DecoderConfig, *, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """A norm over the hidden channels, of the family's kind."""
    if config.norm == "rms":
        return nnx.RMSNorm(config.hidden, epsilon=config.norm_epsilon, rngs=rngs)
    return nnx.LayerNorm(
        config.hidden, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs
    )


def activate(x: Float[Array, "..."], kind: Activation) -> Float[Array, "..."]:
    if kind in ("gelu", "gelu_tanh"):
        return nnx.gelu(x, approximate=kind == "gelu_tanh")
    return {"silu": nnx.silu, "relu": nnx.relu}[kind](x)


class Attention(nnx.Module):
    """Grouped-query attention; projections q, k, v, o."""

    def __init__(self, config: DecoderConfig, layer: Layer, *, rngs: nnx.Rngs):
        c = config
        self.heads, self.kv_heads, self.head_size = c.heads, layer.kv_heads, c.head_size
        self.layer, self.rotated, self.qk_norm = layer, c.rotated, c.qk_norm
        self.scale, self.cap, self.clip = c.attention_scale, c.attention_cap, c.qkv_clip
        self.norm_whole, self.causal = c.qk_norm_whole, c.causal
        inner, kv = c.heads * c.head_size, layer.kv_heads * c.head_size
        self.q = nnx.Linear(c.hidden, inner, use_bias=c.qkv_bias, rngs=rngs)
        self.k = nnx.Linear(c.hidden, kv, use_bias=c.qkv_bias, rngs=rngs)
        self.v = nnx.Linear(c.hidden, kv, use_bias=c.qkv_bias, rngs=rngs)
        self.o = nnx.Linear(inner, c.hidden, use_bias=c.output_bias, rngs=rngs)
        if c.qk_norm:
            wide_q, wide_k = (inner, kv) if c.qk_norm_whole else (c.head_size, c.head_size)
            self.q_norm = nnx.RMSNorm(wide_q, epsilon=c.norm_epsilon, rngs=rngs)
            self.k_norm = nnx.RMSNorm(wide_k, epsilon=c.norm_epsilon, rngs=rngs)
        self.cache = c.cache
        if c.cache is not None:
            self.k_scale, self.v_scale = nnx.Param(jnp.zeros(1)), nnx.Param(jnp.zeros(1))

    @property
    def largest(self) -> float:
        """The largest element of the cache; fp8 is E4M3."""
        assert self.cache is not None
        return RANGE[self.cache][1]

    def mix(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: KVCache | None
    ) -> tuple[Float[Array, "B T i"], KVCache | None]:
        """Everything but the output projection; a cache is read, extended and returned. One of
        codes needs scales that were fitted.
        """
        q, k, v = self.projected(x, positions)
        window, scale, cap = self.layer.window, self.scale, self.cap
        if not self.causal:
            y = attention.everywhere(q, k, v, scale=scale)
        elif cache is None:
            if self.cache is not None:
                k = rounded(k, self.k_scale[...], self.cache)
                v = rounded(v, self.v_scale[...], self.cache)
            y = attention.causal(q, k, v, window=window, scale=scale, cap=cap)
        else:
            cache, scales = self._extended(cache, k, v)
            if q.shape[1] == 1:
                y = decode_attention(
                    q[:, 0], cache.k, cache.v, positions[:, 0] + 1, **scales,
                    kind=self.cache or "float", window=window, scale=scale, cap=cap,
                )  # fmt: skip
            else:
                k, v = cache.k, cache.v
                if scales:
                    k, v = (decoded(x, s) for x, s in zip((k, v), scales.values(), strict=True))
                y = attention.cached(q, k, v, positions, window=window, scale=scale, cap=cap)
        return y.reshape(*x.shape[:2], self.heads * self.head_size), cache

    def _extended(self, cache: KVCache, k, v) -> tuple[KVCache, dict[str, Any]]:
        """The cache with more keys and values, and the scales of its codes."""
        if self.cache is None:
            return append(cache, k, v), {}
        scales = {"k_scale": self.k_scale[...], "v_scale": self.v_scale[...]}
        codes = (encoded(x, s, self.cache) for x, s in zip((k, v), scales.values(), strict=True))
        return append(cache, *codes), scales

    def projected(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T n h"], Float[Array, "B T k h"], Float[Array, "B T k h"]]:
        """Queries, keys and values as attention takes them, positions in."""
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm and self.norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (jnp.clip(z, -self.clip, self.clip) for z in (q, k, v))
        q = q.reshape(b, t, self.heads, self.head_size)
        k, v = (z.reshape(b, t, self.kv_heads, self.head_size) for z in (k, v))
        if self.qk_norm and not self.norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        return self._turned(q, positions), self._turned(k, positions), v

    def _turned(self, x: Float[Array, "B T n h"], positions: Int[Array, "B T"]):
        if self.layer.theta is None:
            return x
        size, scaling = self.rotated or self.head_size, self.layer.scaling
        f = rope.turning(size, self.layer.theta, scaling, positions)
        return rope.rotate(x, positions, f, 1.0 if scaling is None else scaling.stretch)


class MLP(nnx.Module):
    """The feed-forward layer: down(act(gate(x)) * up(x)), or down(act(up(x)))."""

    def __init__(self, config: DecoderConfig, width: int, *, rngs: nnx.Rngs):
        """width: of the layer between."""
        c, f = config, width
        self.activation, self.gated = c.activation, c.gated
        if c.gated:
            self.gate = nnx.Linear(c.hidden, f, use_bias=c.mlp_bias, rngs=rngs)
        self.up = nnx.Linear(c.hidden, f, use_bias=c.mlp_bias, rngs=rngs)
        self.down = nnx.Linear(f, c.hidden, use_bias=c.mlp_bias, rngs=rngs)

    def spread(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Everything but the last projection."""
        if not self.gated:
            return activate(self.up(x), self.activation)
        return activate(self.gate(x), self.activation) * self.up(x)
