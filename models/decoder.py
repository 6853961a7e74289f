"""A decoder-only transformer that covers Llama, SmolLM2, Mistral, Qwen2 and Qwen3 by configuration.

A block is a chain of *stages* that meet at its *sites*: stage s runs the readers of site s - 1 and
everything up to site s. The forward pass is the chain; compression walks the same chain, one site
at a time. Shapes: B windows, T tokens, D hidden, n heads, k key-value heads, h head size.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import attention, rope
from models.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder and the conventions of its family."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    context: int  # the longest sequence the model allows, in tokens
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: rope.RopeScaling | None = None
    windows: tuple[int | None, ...] | None = None  # sliding window of each layer, None: all see all
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even for rotary positions.")
        if self.windows is not None and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.layers} layers.")

    def window(self, layer: int) -> int | None:
        """The number of tokens that each token of this layer sees, itself included."""
        return None if self.windows is None else self.windows[layer]


class KVCache(NamedTuple):
    """Keys and values of one layer's first `length` positions; the rest is room."""

    k: Float[Array, "B S k h"]
    v: Float[Array, "B S k h"]
    length: Int[Array, ""]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; projections q, k, v, o."""

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        c = config
        self.heads, self.kv_heads, self.head_size = c.heads, c.kv_heads, c.head_size
        self.theta, self.scaling, self.window = c.rope_theta, c.rope_scaling, c.window(layer)
        inner, kv = c.heads * c.head_size, c.kv_heads * c.head_size
        self.q = nnx.Linear(c.hidden, inner, use_bias=c.qkv_bias, rngs=rngs)
        self.k = nnx.Linear(c.hidden, kv, use_bias=c.qkv_bias, rngs=rngs)
        self.v = nnx.Linear(c.hidden, kv, use_bias=c.qkv_bias, rngs=rngs)
        self.o = nnx.Linear(inner, c.hidden, use_bias=c.output_bias, rngs=rngs)
        if c.qk_norm:
            self.q_norm = nnx.RMSNorm(c.head_size, epsilon=c.norm_epsilon, rngs=rngs)
            self.k_norm = nnx.RMSNorm(c.head_size, epsilon=c.norm_epsilon, rngs=rngs)
        self.qk_norm = c.qk_norm

    def mix(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: KVCache | None
    ) -> tuple[Float[Array, "B T i"], KVCache | None]:
        """Everything but the output projection; a cache is read, extended and returned."""
        b, t, _ = x.shape
        q = self.q(x).reshape(b, t, self.heads, self.head_size)
        k = self.k(x).reshape(b, t, self.kv_heads, self.head_size)
        v = self.v(x).reshape(b, t, self.kv_heads, self.head_size)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        f = rope.frequencies(self.head_size, self.theta, self.scaling)
        q, k = rope.rotate(q, positions, f), rope.rotate(k, positions, f)
        if cache is None:
            y = attention.causal(q, k, v, window=self.window)
        else:
            cache = append(cache, k, v)
            y = attention.cached(q, cache.k, cache.v, positions, window=self.window)
        return y.reshape(b, t, self.heads * self.head_size), cache


def append(cache: KVCache, k: Float[Array, "B T k h"], v: Float[Array, "B T k h"]) -> KVCache:
    """Write k and v behind the cache's filled positions."""
    start = (0, cache.length, 0, 0)
    return KVCache(
        jax.lax.dynamic_update_slice(cache.k, k.astype(cache.k.dtype), start),
        jax.lax.dynamic_update_slice(cache.v, v.astype(cache.v.dtype), start),
        cache.length + k.shape[1],
    )


class MLP(nnx.Module):
    """The gated feed-forward layer down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.gate = nnx.Linear(c.hidden, c.feed_forward, use_bias=c.mlp_bias, rngs=rngs)
        self.up = nnx.Linear(c.hidden, c.feed_forward, use_bias=c.mlp_bias, rngs=rngs)
        self.down = nnx.Linear(c.feed_forward, c.hidden, use_bias=c.mlp_bias, rngs=rngs)


class Flow(NamedTuple):
    """What travels between the stages of a block."""

    residual: Float[Array, "B T D"]
    activation: Float[Array, "B T i"]  # the input of the next site's readers
    positions: Int[Array, "B T"]
    cache: KVCache | None = None


class Block(nnx.Module):
    """One pre-norm transformer block."""

    sites = (
        Site(
            name="attention.input",
            readers=("attention.q", "attention.k", "attention.v"),
            producer="attention_norm",
            absorbs_scale=True,
            absorbs_rotation=True,  # once the norm's scale is folded into its readers
        ),
        Site(
            name="attention.output",
            readers=("attention.o",),
            producer="attention.v",
            absorbs_scale=True,
            per_head=True,  # one scale per key-value channel, shared by its query heads
            absorbs_rotation=True,  # within a head
        ),
        Site(
            name="mlp.input",
            readers=("mlp.gate", "mlp.up"),
            producer="mlp_norm",
            absorbs_scale=True,
            absorbs_rotation=True,
        ),
        Site(
            name="mlp.hidden",
            readers=("mlp.down",),
            producer="mlp.up",
            absorbs_scale=True,
            absorbs_rotation=False,  # the gate's product is elementwise
        ),
    )

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        c = config
        self.attention_norm = nnx.RMSNorm(c.hidden, epsilon=c.norm_epsilon, rngs=rngs)
        self.attention = Attention(c, layer, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(c.hidden, epsilon=c.norm_epsilon, rngs=rngs)
        self.mlp = MLP(c, rngs=rngs)

    def stages(self) -> tuple[Callable[[Flow], Flow], ...]:
        """The chain: stage s ends at site s, the last one at the block's output."""
        return (
            self._to_attention_input,
            self._to_attention_output,
            self._to_mlp_input,
            self._to_mlp_hidden,
            self._to_output,
        )

    def _to_attention_input(self, flow: Flow) -> Flow:
        return flow._replace(activation=self.attention_norm(flow.residual))

    def _to_attention_output(self, flow: Flow) -> Flow:
        mixed, cache = self.attention.mix(flow.activation, flow.positions, flow.cache)
        return flow._replace(activation=mixed, cache=cache)

    def _to_mlp_input(self, flow: Flow) -> Flow:
        residual = flow.residual + self.attention.o(flow.activation)
        return flow._replace(residual=residual, activation=self.mlp_norm(residual))

    def _to_mlp_hidden(self, flow: Flow) -> Flow:
        x = flow.activation
        return flow._replace(activation=nnx.silu(self.mlp.gate(x)) * self.mlp.up(x))

    def _to_output(self, flow: Flow) -> Flow:
        residual = flow.residual + self.mlp.down(flow.activation)
        return flow._replace(residual=residual, activation=residual)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        flow = Flow(x, x, positions, cache)
        for stage in self.stages():
            flow = stage(flow)
        return flow.residual, flow.cache


class Decoder(nnx.Module):
    """The whole model: embedding, blocks, final norm and head (the embedding's when tied)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.embed = nnx.Embed(c.vocabulary, c.hidden, rngs=rngs)
        self.blocks = nnx.List([Block(c, layer, rngs=rngs) for layer in range(c.layers)])
        self.norm = nnx.RMSNorm(c.hidden, epsilon=c.norm_epsilon, rngs=rngs)
        if not c.tied_embeddings:
            self.head = nnx.Linear(c.hidden, c.vocabulary, use_bias=False, rngs=rngs)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The final norm and the head."""
        x = self.norm(x)
        return self.embed.attend(x) if self.config.tied_embeddings else self.head(x)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the next token at every position of windows that start at position 0."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed(tokens)
        for block in self.blocks:
            x, _ = block(x, positions)
        return self.logits(x)

    def decode(
        self, tokens: Int[Array, "B T"], caches: tuple[KVCache, ...]
    ) -> tuple[Float[Array, "B V"], tuple[KVCache, ...]]:
        """Append tokens to the caches; logits of the token that follows the last one."""
        positions = caches[0].length + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed(tokens)
        extended: list[KVCache] = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, longer = block(x, positions, cache)
            assert longer is not None
            extended.append(longer)
        return self.logits(x[:, -1:])[:, 0], tuple(extended)
