"""A decoder-only transformer that covers its families by configuration.

A block is a chain of *stages* that meet at its *sites*: stage s runs the readers of site s - 1 and
everything up to site s. The forward pass is the chain; compression walks the same chain, one site
at a time. Shapes: B windows, T tokens, D hidden, V vocabulary, n heads, k key-value heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.config import DecoderConfig
from models.layers import MLP, Attention, KVCache, norm
from models.sites import Site


def sites(config: DecoderConfig, layer: int) -> tuple[Site, ...]:
    """Where a block's activations meet its linear layers, in the order of the forward pass."""
    c = config
    return (
        Site(
            name="attention.input",
            readers=("attention.q", "attention.k", "attention.v"),
            producer="attention_norm",
            absorbs_scale=True,
            absorbs_rotation=c.norm == "rms",  # once the norm's scale is folded into its readers
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
            readers=("mlp.gate", "mlp.up") if c.gated else ("mlp.up",),
            producer="mlp_norm",
            absorbs_scale=True,
            absorbs_rotation=c.norm == "rms",
        ),
        Site(
            name="mlp.hidden",
            readers=("mlp.down",),
            producer="mlp.up",
            absorbs_scale=c.gated or c.activation == "relu",  # else it is not linear in up's output
            absorbs_rotation=False,  # what lies between is elementwise
        ),
    )


class Flow(NamedTuple):
    """What travels between the stages of a block."""

    residual: Float[Array, "B T D"]
    activation: Float[Array, "B T i"]  # the input of the next site's readers
    positions: Int[Array, "B T"]
    cache: KVCache | None = None


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        c = config
        self.sites, self.post_norms = sites(c, layer), c.post_norms
        self.residual_scale = c.residual_scale
        self.attention_norm = norm(c, rngs=rngs)
        self.attention = Attention(c, c.layer(layer), rngs=rngs)
        self.mlp_norm = norm(c, rngs=rngs)
        self.mlp = MLP(c, rngs=rngs)
        if c.post_norms:
            self.attention_post_norm = norm(c, rngs=rngs)
            self.mlp_post_norm = norm(c, rngs=rngs)

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
        y = self.attention.o(flow.activation)
        residual = self._joined(flow, self.attention_post_norm(y) if self.post_norms else y)
        return flow._replace(residual=residual, activation=self.mlp_norm(residual))

    def _to_mlp_hidden(self, flow: Flow) -> Flow:
        return flow._replace(activation=self.mlp.spread(flow.activation))

    def _to_output(self, flow: Flow) -> Flow:
        y = self.mlp.down(flow.activation)
        residual = self._joined(flow, self.mlp_post_norm(y) if self.post_norms else y)
        return flow._replace(residual=residual, activation=residual)

    def _joined(self, flow: Flow, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return flow.residual + (y if self.residual_scale == 1 else y * self.residual_scale)

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


class Stem(nnx.Module):
    """From tokens to the first block: the embedding, with the positions where they are learned."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.scale, self.learned = config.embed_scale, config.positions == "learned"
        self.embed = nnx.Embed(config.vocabulary, config.hidden, rngs=rngs)
        if self.learned:
            self.positions = nnx.Embed(config.context, config.hidden, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        x = self.embed(tokens)
        if self.scale != 1:  # rounded to the dtype first, as the models were trained
            x = x * jnp.asarray(self.scale, x.dtype)
        return x + self.positions(positions) if self.learned else x


class Tail(nnx.Module):
    """From the last block to logits: the last norm, and the head if it is not the embedding."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.scale, self.cap, self.tied = c.logit_scale, c.logit_cap, c.tied_embeddings
        self.norm = norm(c, rngs=rngs)
        if not self.tied:
            self.head = nnx.Linear(c.hidden, c.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*m D"], embed: nnx.Embed) -> Float[Array, "*m V"]:
        x = self.norm(x)
        y = embed.attend(x) if self.tied else self.head(x)
        if self.scale != 1:
            y = y * self.scale
        return y if self.cap is None else jnp.tanh(y / self.cap) * self.cap


class Decoder(nnx.Module):
    """The whole model."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.stem = Stem(c, rngs=rngs)
        self.blocks = nnx.List([Block(c, layer, rngs=rngs) for layer in range(c.layers)])
        self.tail = Tail(c, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the next token at every position of windows that start at position 0."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.stem(tokens, positions)
        for block in self.blocks:
            x, _ = block(x, positions)
        return self.tail(x, self.stem.embed)

    def decode(
        self, tokens: Int[Array, "B T"], caches: tuple[KVCache, ...]
    ) -> tuple[Float[Array, "B V"], tuple[KVCache, ...]]:
        """Append tokens to the caches; logits of the token that follows the last one."""
        positions = caches[0].length + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.stem(tokens, positions)
        extended: list[KVCache] = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, longer = block(x, positions, cache)
            assert longer is not None
            extended.append(longer)
        return self.tail(x[:, -1:], self.stem.embed)[:, 0], tuple(extended)
