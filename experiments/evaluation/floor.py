"""The arithmetic floor of a compression: what has to be multiplied, at the rate products reach.

One forward pass over the calibration tokens (every linear layer once, half of attention by
causality), the statistics (half of each Gram product, by symmetry) and the solves (a Cholesky
factor and its inverse, and each weight's update by every column before it).
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.checkpoints.sources import shapes
from models.config import DecoderConfig
from models.decoder import sites


def block_shapes(config: DecoderConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of each site's readers as one matrix."""
    every, found = shapes(config), []
    for site in sites(config, 0):
        readers = [every[f"blocks.0.{path}.weight"] for path in site.readers]
        found.append((sum(o for o, _ in readers), readers[0][1]))
    return found


def operations(config: DecoderConfig, windows: int, context: int) -> dict[str, float]:
    """Floating-point operations of GPTQ's parts over the whole model; a product-sum counts two."""
    shapes, tokens = block_shapes(config), windows * context
    inner = config.heads * config.head_size
    return {
        "linear": config.layers * sum(2.0 * tokens * o * i for o, i in shapes),
        "attention": config.layers * 2.0 * tokens * context * inner,  # half of q kᵀ and of p v
        "statistics": config.layers * sum(float(tokens) * i * i for _, i in shapes),
        "solves": config.layers * sum(2 / 3 * i**3 + float(o) * i * i for o, i in shapes),
    }


def product_rate(config: DecoderConfig, rows: int, repeats: int = 5) -> float:
    """Floating-point operations per second of the model's own float32 products on `rows` rows:
    the total of all shapes over the total of each one's best time."""
    multiply = jax.jit(jnp.matmul)
    done = seconds = 0.0
    for o, i in block_shapes(config):
        x, w = jnp.ones((rows, i)), jnp.ones((i, o))
        seconds += best_seconds(functools.partial(multiply, x, w), repeats)
        done += 2.0 * rows * o * i
    return done / seconds


def best_seconds(run: Callable[[], jax.Array], repeats: int) -> float:
    """The least wall time of several runs, after one to compile."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)
