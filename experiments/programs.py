"""The programs of a run on shapes, which an estimate counts: nothing is read, computed or held.

They call the model's and the method's own functions, as the walk over a block and the evaluation
do, for weights and activations of which only the shape is known.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from algorithms import surgery
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import QuantizedTensor
from experiments.checkpoints.sources import shapes
from models.decoder import Block, DecoderConfig, Flow
from models.sites import Site


def split(build: Callable[[], nnx.Module]) -> tuple[Any, Any]:
    """A module's graph, and its state as shapes."""
    return nnx.split(nnx.eval_shape(build))


def quantized(block: Block, tensors: dict[str, Any]) -> Block:
    """The block as a checkpoint gives it: quantized layers compute on their codes."""
    for path, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tensor)
            surgery.quantize_linear(block, path, zeros)
    return block


def last(config: DecoderConfig) -> nnx.Module:
    """What follows the last block: the norm, and the head or the embedding in its place."""
    c, rngs = config, nnx.Rngs(0)
    norm = nnx.RMSNorm(c.hidden, epsilon=c.norm_epsilon, rngs=rngs)
    if c.tied_embeddings:
        return nnx.List([norm, nnx.Embed(c.vocabulary, c.hidden, rngs=rngs)])
    return nnx.List([norm, nnx.Linear(c.hidden, c.vocabulary, use_bias=False, rngs=rngs)])


def flow_shapes(config: DecoderConfig, chunk: int, context: int, width: int | None = None) -> Flow:
    """A chunk of windows whose activation is `width` wide; by default as it enters a block."""

    def build() -> Flow:
        x = jnp.zeros((chunk, context, config.hidden))
        activation = jnp.zeros((chunk, context, width or config.hidden))
        return Flow(x, activation, jnp.zeros((chunk, context), jnp.int32))

    return jax.eval_shape(build)


def run_stage(graph: Any, state: Any, flow: Flow, *, stage: int) -> Flow:
    """One stage of a block."""
    return nnx.merge(graph, state).stages()[stage](flow)


def run_block(graph: Any, state: Any, x: Any, positions: Any) -> Any:
    """A whole block, as an evaluation runs it."""
    return nnx.merge(graph, state)(x, jnp.broadcast_to(positions, x.shape[:2]))[0]


def reader_rows(config: DecoderConfig, site: Site) -> list[int]:
    """Outputs of each reader of a site."""
    return [_shape(config, path)[0] for path in site.readers]


def _shape(config: DecoderConfig, path: str) -> tuple[int, ...]:
    return shapes(config)[f"blocks.0.{path}.weight"]


def site_shapes(config: DecoderConfig, site: Site, method: LayerwiseMethod) -> tuple[Any, Any, Any]:
    """What a site's readers are compressed from: weights as one matrix, statistics, a key."""
    rows, columns = sum(reader_rows(config, site)), _shape(config, site.readers[0])[1]
    init = method.init or (lambda i: None)  # a data-free method has no statistics
    stats = jax.eval_shape(functools.partial(init, columns))
    key = jax.eval_shape(lambda: jax.random.key(0)) if method.seeded else None
    return jax.ShapeDtypeStruct((rows, columns), jnp.float32), stats, key


def observe(stats: Any, x: Any, *, method: LayerwiseMethod) -> Any:
    """Add one chunk to a site's statistics."""
    assert method.observe is not None
    return method.observe(stats, x.reshape(-1, x.shape[-1]))


def compress(w: Any, stats: Any, key: Any, *, method: LayerwiseMethod) -> Any:
    """A site's readers as one compressed matrix."""
    return method.compress(w, stats, key) if method.seeded else method.compress(w, stats)


def solve(w: Any, stats: Any, key: Any, *, method: LayerwiseMethod) -> Any:
    """Compress, dequantize, measure the error."""
    tensor = compress(w, stats, key, method=method)
    approximation = tensor.dequantize(w.dtype)
    return tensor, approximation, method.error(w, approximation, stats)


def compressed_shapes(config: DecoderConfig, method: LayerwiseMethod) -> dict[str, Any]:
    """One block's compressed weights by module path, as shapes.

    Raises ValueError for weights that the method cannot take.
    """
    found: dict[str, Any] = {}
    for site in Block.sites:
        rows = reader_rows(config, site)

        def pieces(w: Any, stats: Any, key: Any, rows: list[int] = rows) -> Any:
            return compress(w, stats, key, method=method).split(rows)

        w, stats, key = site_shapes(config, site, method)
        found |= zip(site.readers, jax.eval_shape(pieces, w, stats, key), strict=True)
    return found
