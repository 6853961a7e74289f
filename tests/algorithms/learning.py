"""A tiny block with calibration windows, and what a method's result makes of its output."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from algorithms import surgery
from algorithms.numerics import relative_error
from algorithms.walk import compress_block, set_weights
from models.block import Block, Flow
from models.config import DecoderConfig
from models.decoder import sites

CONFIG = DecoderConfig(
    vocabulary=11, hidden=24, layers=1, heads=3, kv_heads=1, head_size=8, feed_forward=32,
    context=64,
)  # fmt: skip
PATHS = [path for site in sites(CONFIG, 0) for path in site.readers]


def block(seed=0):
    return Block(CONFIG, 0, rngs=nnx.Rngs(seed))


def flows(seed=0, count=3):
    """Chunks of two windows of 12 tokens, with correlated channels as a real model's are."""
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    mix = jax.random.normal(jax.random.key(seed + 100), (CONFIG.hidden, CONFIG.hidden))
    keys = jax.random.split(jax.random.key(seed), count)
    xs = [jax.random.normal(key, (2, 12, CONFIG.hidden)) @ mix for key in keys]
    return [Flow(x, x, positions) for x in xs]


def through(model, chunks):
    """The chunks as they leave the block."""
    graph, state = nnx.split(model)
    outputs = [_output(graph, state, flow.residual, flow.positions) for flow in chunks]
    return [flow._replace(residual=y) for flow, y in zip(chunks, outputs, strict=True)]


@functools.partial(jax.jit, static_argnames="graph")
def _output(graph, state, x, positions):
    return nnx.merge(graph, state)(x, positions)[0]


def output_error(tensors, seed=0):
    """Relative squared error of the block's output with compressed weights in place."""
    model, chunks = block(seed), flows(seed)
    expected = jnp.stack([flow.residual for flow in through(model, chunks)])
    set_weights(model, tensors)
    found = jnp.stack([flow.residual for flow in through(model, chunks)])
    return float(relative_error(jnp.sum((found - expected) ** 2), jnp.sum(expected**2)))


def layerwise_error(method, seed=0):
    """The same after a layer-wise method's walk over the block."""
    return output_error(compress_block(block(seed), flows(seed), lambda _: method).tensors, seed)


def weight(path, seed=0):
    return surgery.get_weight(surgery.linear_at(block(seed), path))
