"""A decoder-only transformer that covers its families by configuration.

Shapes: B windows, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.attention import capped
from models.block import Block
from models.config import DecoderConfig
from models.encoder import EncoderBlock
from models.experts import MixtureBlock
from models.layers import KVCache, empty_cache, norm
from models.predictions import Predictions
from models.sites import Site


def sites(config: DecoderConfig, layer: int) -> tuple[Site, ...]:
    """Where a block's activations meet its linear layers, in the order of the forward pass."""
    return _kind(config, layer).wiring(config, layer)


def readers(config: DecoderConfig, layer: int) -> list[str]:
    """The linear layers of a block that can be compressed, by path, in that order."""
    return [path for site in sites(config, layer) for path in site.readers]


def build_block(config: DecoderConfig, layer: int, *, rngs: nnx.Rngs) -> Block:
    """A block of the kind that the layer is."""
    return _kind(config, layer)(config, layer, rngs=rngs)


def _kind(config: DecoderConfig, layer: int) -> type[Block]:
    if config.norms_after:
        return EncoderBlock
    return MixtureBlock if config.mixes(layer) else Block


class Stem(nnx.Module):
    """From tokens to the first block: the embedding, with positions where they are learned."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.scale, self.learned = config.embed_scale, config.positions == "learned"
        self.embed = nnx.Embed(config.vocabulary, config.hidden, rngs=rngs)
        if self.learned:
            self.positions = nnx.Embed(config.context, config.hidden, rngs=rngs)
        self.typed, self.normed = config.token_types > 0, config.norms_after
        if self.typed:
            self.types = nnx.Embed(config.token_types, config.hidden, rngs=rngs)
        if self.normed:
            self.embed_norm = norm(config, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        x = self.embed(tokens)
        if self.scale != 1:  # rounded to the dtype first, as the models were trained
            x = x * jnp.asarray(self.scale, x.dtype)
        x = x + self.positions(positions) if self.learned else x
        x = x + self.types(jnp.zeros_like(tokens)) if self.typed else x
        return self.embed_norm(x) if self.normed else x


class Tail(nnx.Module):
    """From the last block to logits: the last norm, and the head if it is not the embedding.

    Of a model that does not predict, nothing: it gives the last activations.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.scale, self.cap, self.tied = c.logit_scale, c.logit_cap, c.tied_embeddings
        self.predicts = c.predicts
        if self.predicts:
            self.norm = norm(c, rngs=rngs)
        if self.predicts and not self.tied:
            self.head = nnx.Linear(c.hidden, c.vocabulary, use_bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*m D"], embed: nnx.Embed | None = None
    ) -> Float[Array, "*m V"]:
        """embed: where it is tied, the embedding, or its rows for some tokens."""
        if not self.predicts:
            return x
        x = self.norm(x)
        if self.tied:
            assert embed is not None
            y = embed.attend(x)
        else:
            y = self.head(x)
        if self.scale != 1:
            y = y * self.scale
        return capped(y, self.cap)

    def predictions(self, x: Float[Array, "n D"], embed: nnx.Embed) -> Predictions:
        """The same logits, not computed yet. A head that is compressed is unpacked."""
        if not self.predicts:
            raise ValueError("An encoder predicts no tokens: train or distil a decoder.")
        x = self.norm(x)
        x = x if self.scale == 1 else x * self.scale
        if self.tied:
            return Predictions(x, embed.embedding[...], self.cap)
        return Predictions(x, dense_weight(self.head), self.cap)


def dense_weight(linear: Any) -> Float[Array, "o i"]:
    """W of a linear layer, or of one over a compressed tensor."""
    if isinstance(linear, nnx.Linear):
        return linear.kernel[...].T
    return linear.tensor.dequantize()


class Decoder(nnx.Module):
    """The whole model."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.remat = False  # whether a block's activations are computed anew in a backward pass
        self.stem = Stem(c, rngs=rngs)
        self.blocks = nnx.List([build_block(c, layer, rngs=rngs) for layer in range(c.layers)])
        self.tail = Tail(c, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the next token at every position of windows that start at position 0."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.stem(tokens, positions)
        for block in self.blocks:
            x, _ = block(x, positions)
        return self.tail(x, self.stem.embed)

    def predictions(
        self, tokens: Int[Array, "B T"], features: Sequence[int] = (), related: Sequence[int] = ()
    ) -> Predictions:
        """Of the next token at every position, positions of all windows in one row.

        features: blocks whose outputs are wanted too, related: those whose queries, keys and values
        are, by number.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        run = nnx.remat(_forward) if self.remat else _forward
        x = self.stem(tokens, positions)
        entering = [x]
        for block in self.blocks:
            entering.append(run(block, entering[-1], positions))
        found = self.tail.predictions(_rows(entering[-1]), self.stem.embed)
        qkv = [self.blocks[n].related(entering[n], positions) for n in related]
        return found._replace(
            features=tuple(_rows(entering[n + 1]) for n in features), related=tuple(qkv)
        )

    def empty_caches(self, rows: int, room: int) -> tuple[KVCache, ...]:
        """Of all layers, for sequences of up to `room` places."""
        return tuple(empty_cache(self.config, n, rows, room) for n, _ in enumerate(self.blocks))

    def decode(
        self, tokens: Int[Array, "B T"], caches: tuple[KVCache, ...], count: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], tuple[KVCache, ...]]:
        """Append the first `count` tokens of each row to the caches; logits of what follows them.

        What is behind them is padding: no later token sees it.
        """
        last = count[:, None] - 1
        places = jnp.minimum(jnp.arange(tokens.shape[1]), last)  # no place beyond the last
        positions = caches[0].length[:, None] + places
        x = self.stem(tokens, positions)
        extended: list[KVCache] = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, longer = block(x, positions, cache)
            assert longer is not None
            extended.append(longer._replace(length=cache.length + count))
        x = jnp.take_along_axis(x, last[..., None], axis=1)
        return self.tail(x, self.stem.embed)[:, 0], tuple(extended)


def _rows(x: Float[Array, "B T D"]) -> Float[Array, "n D"]:
    return x.reshape(-1, x.shape[-1])


def _forward(block: Block, x: Float[Array, "B T D"], positions: Int[Array, "B T"]):
    return block(x, positions)[0]
