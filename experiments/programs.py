"""The programs of a run on shapes, which an estimate counts: nothing is read, computed or held.

They call the model's and the method's own functions, as the walk over a block and the evaluation
do, for weights and activations of which only the shape is known.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from algorithms import surgery
from algorithms.blockwise import BlockwiseMethod
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import CompressedTensor
from algorithms.walk import grouped
from experiments.checkpoints.sources import shapes
from models.decoder import Block, DecoderConfig, Flow
from models.sites import Site


def split(build: Callable[[], nnx.Module]) -> tuple[Any, Any]:
    """A module's graph, and its state as shapes."""
    return nnx.split(nnx.eval_shape(build))


def quantized(block: Block, tensors: dict[str, Any]) -> Block:
    """The block as a checkpoint gives it: quantized layers compute on their codes."""
    for path, tensor in tensors.items():
        if isinstance(tensor, CompressedTensor):
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tensor)
            surgery.compress_linear(block, path, zeros)
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


class Solved(NamedTuple):
    """Readers of a site that one method compresses as one matrix."""

    site: Site
    method: Any  # LayerwiseMethod or BlockwiseMethod
    paths: tuple[str, ...]


def groups(config: DecoderConfig, methods: Mapping[str, Any]) -> list[Solved]:
    """A block's layers as the walk takes them; methods: by path within the block."""
    return [
        Solved(site, method, tuple(paths))
        for site in Block.sites
        for method, paths in grouped(
            {path: _shape(config, path)[0] for path in site.readers}, methods.get
        )
    ]


def _rows(config: DecoderConfig, group: Solved) -> list[int]:
    return [_shape(config, path)[0] for path in group.paths]


def _shape(config: DecoderConfig, path: str) -> tuple[int, ...]:
    return shapes(config)[f"blocks.0.{path}.weight"]


def site_shapes(config: DecoderConfig, group: Solved) -> tuple[Any, Any, Any]:
    """What readers are compressed from: weights as one matrix, statistics, a key."""
    rows, columns = sum(_rows(config, group)), _shape(config, group.paths[0])[1]
    init = group.method.init if observes(group.method) else None
    stats = None if init is None else jax.eval_shape(functools.partial(init, columns))
    seeded = group.method.seeded
    key = jax.eval_shape(lambda: jax.random.key(0)) if seeded else None
    return jax.ShapeDtypeStruct((rows, columns), jnp.float32), stats, key


def observes(method: Any) -> bool:
    """Whether a method has statistics of single sites."""
    return method.observe is not None


def observe(stats: Any, x: Any, *, method: Any) -> Any:
    """Add one chunk to a site's statistics."""
    x = x.reshape(-1, x.shape[-1])
    paired = isinstance(method, LayerwiseMethod) and method.paired
    return method.observe(stats, x, x) if paired else method.observe(stats, x)


def compress(w: Any, stats: Any, key: Any, *, method: Any) -> Any:
    """A site's readers as one compressed matrix."""
    seeded = method.seeded
    return method.compress(w, stats, key) if seeded else method.compress(w, stats)


def solve(w: Any, stats: Any, key: Any, *, method: Any) -> Any:
    """Compress, dequantize, measure the error."""
    tensor = compress(w, stats, key, method=method)
    approximation = tensor.dequantize(w.dtype)
    if isinstance(method, BlockwiseMethod):
        return tensor, approximation
    return tensor, approximation, method.error(w, approximation, stats)


def compressed_shapes(config: DecoderConfig, methods: Mapping[str, Any]) -> dict[str, Any]:
    """One block's compressed weights by module path, as shapes.

    Raises ValueError for weights that a method cannot take.
    """
    found: dict[str, Any] = {}
    for group in groups(config, methods):
        rows = _rows(config, group)

        def pieces(w: Any, stats: Any, key: Any, group=group, rows=rows) -> Any:
            return compress(w, stats, key, method=group.method).split(rows)

        found |= zip(group.paths, jax.eval_shape(pieces, *site_shapes(config, group)), strict=True)
    return found


def end_shape(shape: tuple[int, ...], method: Any) -> Any:
    """The embedding or the head as a method without calibration compresses it, as shapes."""
    key = jax.eval_shape(lambda: jax.random.key(0)) if method.seeded else None
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(compress, method=method), w, None, key)
