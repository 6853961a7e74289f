"""Sampling from a language model: how a token is chosen, and a whole text in one graph.

Holtzman, Buys, Du, Forbes, Choi, The Curious Case of Neural Text Degeneration, ICLR 2020,
arXiv:1904.09751: top-p, of the likeliest tokens that together have the probability top_p.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from algorithms.numerics import widened

Decode = Callable[..., tuple[Float[Array, "B V"], Any]]  # (tokens [B T], cache, count [B])


class Generated(NamedTuple):
    tokens: Int[Array, "B T"]  # behind a stop token, that token again
    mask: Bool[Array, "B T"]  # what was generated, the stop token included
    log_probabilities: Float[Array, "B T"]  # of what they were drawn from; 0 outside the mask


def generate(
    decode: Decode,
    cache: Any,
    prompt: Int[Array, "B P"],
    count: Int[Array, " B"],
    key: Key[Array, ""],
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
) -> Generated:
    """`steps` tokens behind the first `count` of each prompt.

    decode: (tokens, cache, count) to logits and the longer cache, as `Decoder.decode`. The cache
    has room for the prompt and `steps` tokens. temperature 0 takes the likeliest. Each row and
    step draws by a key of its own. The graph does not grow with `steps`.
    """
    require_settings(temperature, top_k, top_p)

    def step(carry: Any, keys: Key[Array, " B"]) -> Any:
        logits, cache, running = carry
        logits = filtered(logits, temperature, top_k, top_p)
        token = jax.vmap(jax.random.categorical)(keys, logits)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
        if stop is not None:
            token = jnp.where(running, token, stop)
        out = Generated(token, running, jnp.where(running, log_p, 0))
        running = running if stop is None else running & (token != stop)
        logits, cache = decode(token[:, None], cache, jnp.ones_like(count))
        return (widened(logits), cache, running), out

    logits, cache = decode(prompt, cache, count)
    keys = jax.random.split(key, (steps, len(prompt)))
    start = widened(logits), cache, jnp.ones(len(prompt), bool)
    _, generated = lax.scan(step, start, keys)
    return Generated(*(x.T for x in generated))


def filtered(
    logits: Float[Array, "*B V"],
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Array, "*B V"]:
    """Logits of what is drawn from: temperature first, then top-k, then top-p among what is left.

    Temperature 0 leaves the likeliest token, the first of several.
    """
    if temperature == 0:
        best = jnp.argmax(logits, -1)
        return jnp.where(jax.nn.one_hot(best, logits.shape[-1], dtype=bool), 0.0, -jnp.inf)
    logits = logits / temperature
    if top_k is not None:
        kth = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    return logits if top_p is None else nucleus(logits, top_p)


def nucleus(logits: Float[Array, "*B V"], top_p: float) -> Float[Array, "*B V"]:
    """The smallest set of the likeliest tokens that reaches top_p."""
    p = jnp.sort(jax.nn.softmax(logits), descending=True)
    before = jnp.cumsum(p, -1) - p
    smallest = jnp.min(jnp.where(before < top_p, p, jnp.inf), -1, keepdims=True)
    return jnp.where(jax.nn.softmax(logits) < smallest, -jnp.inf, logits)


def require_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for what is out of range."""
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1], or None.")
