"""A tiny block whose channels differ, and what it computes, for tests of scaling."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from algorithms import surgery, walk
from models.block import Block, Flow
from models.config import DecoderConfig
from models.decoder import sites

CONFIG = DecoderConfig(
    vocabulary=11, hidden=24, layers=1, heads=3, kv_heads=1, head_size=8, feed_forward=32,
    context=64, qkv_bias=True, mlp_bias=True,
)  # fmt: skip
READERS = [path for site in sites(CONFIG, 0) for path in site.readers]


def block(seed=0):
    """Grouped heads, biases that are not zero, and norms with outlier channels."""
    made, rng = Block(CONFIG, 0, rngs=nnx.Rngs(seed)), np.random.default_rng(seed)
    for linear in (made.attention.q, made.attention.v, made.mlp.up):
        linear.bias.set_value(jnp.asarray(rng.normal(size=linear.out_features), jnp.float32))
    for norm in (made.attention_norm, made.mlp_norm):
        norm.scale.set_value(jnp.asarray(np.exp(rng.normal(size=24)), jnp.float32))
    return made


def chunks(count=1, seed=0):
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    xs = np.random.default_rng(seed).normal(size=(count, 2, 12, CONFIG.hidden))
    return [Flow(x, x, positions) for x in jnp.asarray(xs, jnp.float32)]


def output(block):
    """What the block makes of the first of `chunks`, by the walk's own compiled stages."""
    flows = chunks(1)
    for stage in range(len(sites(CONFIG, 0)) + 1):
        walk.advance(block, flows, stage)
    return np.asarray(flows[0].residual)


def weights(block):
    return {path: surgery.get_weight(surgery.linear_at(block, path)) for path in READERS}


def moved(before, after):
    """The largest relative change of any weight, by reader."""
    old, new = weights(before), weights(after)
    return {path: float(jnp.abs(new[path] / old[path] - 1).max()) for path in READERS}
