"""Text from a model, token by token, over a key-value cache."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from algorithms.decoding.sampling import filtered
from experiments.errors import UserError
from experiments.evaluation.scoring import padded
from models.decoder import Decoder


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

    Raises UserError if the prompt is empty or does not leave room in the model's context.
    """
    steps = generate_together(
        model, [prompt], max_tokens=max_tokens, sampling=sampling, keys=key[None]
    )
    for (token,) in steps:
        if token in stops:
            return
        yield int(token)


def generate_together(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    keys: Key[Array, " B"],
) -> Iterator[Int[np.ndarray, " B"]]:
    """The next token of every prompt, `max_tokens` times: where each text ends, the caller sees.

    What follows a prompt does not depend on the others, but for rounding. They are padded to few
    lengths, and caches are made for them, so that not all are compiled anew. Raises UserError if a
    prompt is empty or does not leave room in the model's context.
    """
    for prompt in prompts:
        _require_room(len(prompt), max_tokens, model.config.context)
    graph, state = nnx.split(model)
    longest, context = max(map(len, prompts)), model.config.context
    room = padded(longest + max_tokens, context)
    caches = model.empty_caches(len(prompts), room)  # each its own: they are donated
    tokens = np.zeros((len(prompts), padded(longest, context)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    count = np.array(list(map(len, prompts)), np.int32)
    own = jax.vmap(lambda key: jax.random.split(key, max_tokens), out_axes=1)(keys)
    for step_keys in own:
        token, caches = _step(graph, state, tokens, caches, count, step_keys, sampling=sampling)
        yield np.asarray(token)
        tokens, count = token[:, None], np.ones_like(count)


def _require_room(length: int, max_tokens: int, context: int) -> None:
    if not length:
        raise UserError("The prompt has no tokens: give some text to continue.")
    if length + max_tokens > context:
        raise UserError(
            f"The prompt's {length} tokens and max_tokens={max_tokens} exceed the model's "
            f"context of {context}: shorten one of them."
        )


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames="caches")
def _step(graph, state, tokens: Int[Array, "B T"], caches, count, keys, *, sampling: Sampling):
    logits, caches = nnx.merge(graph, state).decode(tokens, caches, count)
    logits = logits.astype(jnp.float32)
    return jax.vmap(functools.partial(choose, sampling=sampling))(logits, keys), caches


def choose(
    logits: Float[Array, "*B V"], key: Key[Array, ""], sampling: Sampling
) -> Int[Array, "*B"]:
    """One token per row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1)
    kept = filtered(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.random.categorical(key, kept)
