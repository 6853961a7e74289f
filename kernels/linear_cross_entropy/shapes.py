"""The heads of real language models, and the tokens of a step of training."""

import functools

import jax
import jax.numpy as jnp

from kernels.linear_cross_entropy.api import bucket, linear_cross_entropy
from kernels.workload import Cost, Workload

GIGABYTE = 10**9

SHAPES = {  # tokens, width, vocabulary
    "Llama-3-8B": (8192, 4096, 128256),
    "Llama-3.2-1B": (4096, 2048, 128256),
    "Qwen2.5-7B": (8192, 3584, 152064),
    "SmolLM2-135M": (4096, 576, 49152),
}


def arguments(key, tokens, width, vocabulary, dtype=jnp.bfloat16, ignored=0.1):
    """Logits spread by 2, and some tokens ignored."""
    keys = jax.random.split(key, 4)
    h = jax.random.normal(keys[0], (tokens, width), dtype)
    w = jax.random.normal(keys[1], (vocabulary, width), dtype) * (2 * width**-0.5)
    y = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    y = jnp.where(jax.random.uniform(keys[3], (tokens,)) < ignored, -100, y)
    return h, w.astype(dtype), y


def plain(h, w, y):
    """All logits at once, as XLA likes them."""
    logits = jnp.einsum("td,vd->tv", h, w, preferred_element_type=jnp.float32)
    target = jnp.take_along_axis(logits, jnp.maximum(y, 0)[:, None], axis=1)[:, 0]
    return jnp.where(y == -100, 0, jax.nn.logsumexp(logits, axis=1) - target)


def trained(loss):
    """Its mean and the gradients of it, as a step of training takes them."""

    def run(h, w, y, **settings):
        return jax.value_and_grad(lambda h, w: loss(h, w, y, **settings).mean(), (0, 1))(h, w)

    return run


def _workloads(name, tokens, width, vocabulary):
    make = functools.partial(arguments, tokens=tokens, width=width, vocabulary=vocabulary)
    product = 2 * tokens * width * vocabulary
    operands = 2 * (tokens + vocabulary) * width
    of = bucket(*jax.eval_shape(make, jax.random.key(0))[:2])
    yield name, Workload(
        make, linear_cross_entropy, Cost(operands + 8 * tokens, product), f"forward, {of}",
        plain, temporary=GIGABYTE,
    )  # fmt: skip
    # Backward computes the logits anew: that is the price of not holding them.
    yield f"{name}, trained", Workload(
        make, trained(linear_cross_entropy), Cost(2 * operands + 4 * tokens, 4 * product), of,
        trained(plain), temporary=GIGABYTE,
    )  # fmt: skip


WORKLOADS = {
    key: workload for name, shape in SHAPES.items() for key, workload in _workloads(name, *shape)
}
