"""Text from a model, token by token, over a key-value cache."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from experiments.errors import UserError
from experiments.evaluation.scoring import padded
from models.decoder import Decoder
from models.layers import KVCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together have this probability

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"sampling.temperature={self.temperature} must not be negative.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"sampling.top_k={self.top_k} must be at least 1, or null.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p={self.top_p} must be in (0, 1], or null.")


def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    stops: Sequence[int],
    sampling: Sampling,
    key: Key[Array, ""],
) -> Iterator[int]:
    """Tokens that follow the prompt, up to `max_tokens` or to a stop token, which is left out.

    Prompts are padded to few lengths, and caches are made for them, so that not every prompt is
    compiled anew. Raises UserError if the prompt is empty or does not leave room in the model's
    context.
    """
    room = len(prompt) + max_tokens
    if not prompt:
        raise UserError("The prompt has no tokens: give some text to continue.")
    if room > model.config.context:
        raise UserError(
            f"The prompt's {len(prompt)} tokens and max_tokens={max_tokens} exceed the model's "
            f"context of {model.config.context}: shorten one of them."
        )
    graph, state = nnx.split(model)
    caches = empty_caches(model, padded(room, model.config.context))
    tokens, count = jnp.asarray(_filled(prompt, model.config.context))[None], len(prompt)
    for step_key in jax.random.split(key, max_tokens):
        token, caches = _step(graph, state, tokens, caches, count, step_key, sampling=sampling)
        if (chosen := int(token[0])) in stops:
            return
        yield chosen
        tokens, count = token[:, None], 1


def _filled(prompt: Sequence[int], context: int) -> Int[np.ndarray, " T"]:
    tokens = np.zeros(padded(len(prompt), context), np.int32)
    tokens[: len(prompt)] = prompt
    return tokens


def empty_caches(model: Decoder, room: int) -> tuple[KVCache, ...]:
    """Caches for one sequence of up to `room` positions."""
    c = model.config
    shape = (1, room, c.kv_heads, c.head_size)
    return tuple(
        KVCache(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((), jnp.int32))
        for _ in range(c.layers)
    )


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames="caches")
def _step(graph, state, tokens: Int[Array, "B T"], caches, count, key, *, sampling: Sampling):
    logits, caches = nnx.merge(graph, state).decode(tokens, caches, count)
    return choose(logits.astype(jnp.float32), key, sampling), caches


def choose(
    logits: Float[Array, "B V"], key: Key[Array, ""], sampling: Sampling
) -> Int[Array, " B"]:
    """One token per row: temperature first, then top-k, then top-p among what is left."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None:
        logits = _nucleus(logits, sampling.top_p)
    return jax.random.categorical(key, logits)


def _nucleus(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Holtzman et al., 2019, arXiv:1904.09751: the smallest set that reaches top_p."""
    p = jnp.sort(jax.nn.softmax(logits), descending=True)
    before = jnp.cumsum(p, -1) - p
    smallest = jnp.min(jnp.where(before < top_p, p, jnp.inf), -1, keepdims=True)
    return jnp.where(jax.nn.softmax(logits) < smallest, -jnp.inf, logits)
