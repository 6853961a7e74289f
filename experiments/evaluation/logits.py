"""How likely tokens are after a model's last activations. The head takes more memory than a block
where vocabularies are large, and logits more still: both come in parts.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from algorithms.search import kl
from algorithms.walk import unpack_layers
from experiments.checkpoints.loading import load_stem, load_tail
from experiments.checkpoints.sources import Source
from models.config import DecoderConfig

LOGITS = 256  # positions whose logits are held at once
ROWS = 256  # of the head stay together: no format's block has more
HEAD = 1 << 28  # bytes of the head's rows, as float32, that are held at once


class Seen(NamedTuple):
    """Of the logits seen so far, at each position."""

    top: Float[Array, " n"]
    total: Float[Array, " n"]  # Σ exp(logit - top)
    own: Float[Array, " n"]  # of the token that follows

    @property
    def loss(self) -> Float[Array, " n"]:
        """Of the token that follows, in nats."""
        return self.top + jnp.log(self.total) - self.own

    @property
    def greedy(self) -> Bool[Array, " n"]:
        """Whether no token is likelier than the one that follows."""
        return self.own >= self.top


def following(
    source: Source,
    states: Sequence[Float[Array, "_ D"]],
    tokens: Sequence[Int[Array, " _"]],
) -> list[Seen]:
    """What a model's logits say of `tokens` at positions whose last activations are `states`.

    Each shape among the states is compiled.
    """
    found = [nothing(len(x)) for x in states]
    for first, graph, state in heads(source):
        for n, (x, token) in enumerate(zip(states, tokens, strict=True)):
            found[n] = see(graph, state, x, token - first, found[n])
    return found


def nothing(positions: int) -> Seen:
    return Seen(jnp.full(positions, -jnp.inf), jnp.zeros(positions), jnp.zeros(positions))


def heads(source: Source) -> Iterator[tuple[int, Any, Any]]:
    """What gives logits, for as many tokens at a time as fit HEAD: the first of them, graph and
    state of the tail, and of the embedding where it is tied.
    """
    config, step = source.config, rows_at_once(source.config)
    for first in range(0, config.vocabulary, step):
        rows = slice(first, first + step)
        tail = load_tail(source, rows=rows)
        unpack_layers(tail)
        embed = [load_stem(source, rows=rows).embed] if config.tied_embeddings else []
        yield first, *nnx.split(nnx.List([tail, *embed]))


def rows_at_once(config: DecoderConfig) -> int:
    return min(config.vocabulary, max(1, HEAD // (4 * config.hidden) // ROWS) * ROWS)


@functools.partial(jax.jit, static_argnames="graph")
def see(graph, state, x: Float[Array, "n D"], tokens: Int[Array, " n"], seen: Seen) -> Seen:
    """With some more tokens' logits; `tokens` counts from the first of these."""
    tail, *embed = nnx.merge(graph, state)

    def add(position):
        x, token, seen = position
        logits = tail(x, *embed).astype(jnp.float32)
        top = jnp.maximum(seen.top, logits.max())
        total = seen.total * jnp.exp(seen.top - top) + jnp.exp(logits - top).sum()
        here = (token >= 0) & (token < len(logits))
        own = jnp.where(here, logits[jnp.clip(token, 0, len(logits) - 1)], seen.own)
        return Seen(top, total, own)

    return jax.lax.map(add, (x, tokens, seen), batch_size=LOGITS)


def gradients(
    source: Source, states: Sequence[Float[Array, "_ D"]], tokens: Sequence[Int[Array, " _"]]
) -> list[Float[Array, "_ D"]]:
    """Of the loss of each position, by the last activations there: the sum over parts of the head,
    once it is known what all logits come to.
    """
    seen = following(source, states, tokens)
    found = [jnp.zeros_like(x) for x in states]
    for first, graph, state in heads(source):
        for n, (x, token) in enumerate(zip(states, tokens, strict=True)):
            log_z = seen[n].top + jnp.log(seen[n].total)
            found[n] += _pull(graph, state, x, token - first, log_z)
    return found


def loss_gradients(
    source: Source,
    chunks: Sequence[Float[Array, "_ _ D"]],
    batches: Iterable[Int[np.ndarray, "_ _"]],
) -> list[Float[Array, "_ _ D"]]:
    """Of the loss of all tokens together, in nats, by the last activations of windows."""
    states = [x[:, :-1].reshape(-1, x.shape[-1]) for x in chunks]
    found = gradients(source, states, [jnp.asarray(b[:, 1:].ravel(), jnp.int32) for b in batches])
    return [
        jnp.pad(g.reshape(len(x), -1, x.shape[-1]), ((0, 0), (0, 1), (0, 0)))  # the last position
        for g, x in zip(found, chunks, strict=True)  # predicts nothing
    ]


@functools.partial(jax.jit, static_argnames="graph")
def _pull(
    graph, state, x: Float[Array, "n D"], tokens: Int[Array, " n"], log_z: Float[Array, " n"]
):
    tail, *embed = nnx.merge(graph, state)

    def one(position):
        x, token, log_z = position
        logits, pull = jax.vjp(lambda x: tail(x, *embed).astype(jnp.float32), x)
        own = jnp.arange(len(logits)) == token
        return pull(jnp.exp(logits - log_z) - own)[0]

    return jax.lax.map(one, (x, tokens, log_z), batch_size=LOGITS)


def divergences(
    source: Source, states: Float[Array, "n D"], changed: Sequence[Float[Array, "n D"]]
) -> list[Float[Array, " n"]]:
    """KL(p ‖ p') at each position, in nats: of the model's predictions, and of those whose last
    activations are changed, in several ways.
    """
    found = [kl.nothing(len(states)) for _ in changed]
    for _, graph, state in heads(source):
        for n, x in enumerate(changed):
            found[n] = _diverge(graph, state, states, x, found[n])
    return [each.divergence for each in found]


@functools.partial(jax.jit, static_argnames="graph")
def _diverge(graph, state, x: Float[Array, "n D"], y: Float[Array, "n D"], parts: kl.Parts):
    tail, *embed = nnx.merge(graph, state)

    def one(position):
        x, y, parts = position
        logits, other = (tail(z, *embed).astype(jnp.float32) for z in (x, y))
        return kl.add(parts, logits, other)

    return jax.lax.map(one, (x, y, parts), batch_size=LOGITS)
