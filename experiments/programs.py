"""The programs of a run on shapes, which an estimate counts: nothing is read, computed or held.

They call the model's and the method's own functions, as the walk over a block and the evaluation
do, for weights and activations of which only the shape is known.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from algorithms import mixtures, surgery
from algorithms.blockwise import BlockwiseMethod
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import CompressedTensor, ExpertsTensor
from algorithms.walk import grouped
from experiments.checkpoints.sources import shapes
from models.block import Block, Flow
from models.config import DecoderConfig
from models.decoder import Stem, Tail, sites
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
    """What follows the last block, and the embedding where it serves as its head."""
    rngs = nnx.Rngs(0)
    embed = [Stem(config, rngs=rngs).embed] if config.tied_embeddings else []
    return nnx.List([Tail(config, rngs=rngs), *embed])


def flow_shapes(config: DecoderConfig, chunk: int, context: int) -> Flow:
    """A chunk of windows as it enters a block."""

    def build() -> Flow:
        x = jnp.zeros((chunk, context, config.hidden))
        return Flow(x, x, jnp.zeros((chunk, context), jnp.int32))

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
    layer: int  # one that has them


def groups(config: DecoderConfig, layer: int, methods: Mapping[str, Any]) -> list[Solved]:
    """A block's layers as the walk takes them; methods: by path within the block."""
    return [
        Solved(site, method, tuple(paths), layer)
        for site in sites(config, layer)
        for method, paths in grouped(
            {path: _shape(config, layer, path)[-2] for path in site.readers}, methods.get
        )
    ]


def typical(config: DecoderConfig) -> int:
    """The first of the largest layers: with experts, where some have them."""
    return max(range(config.layers), key=lambda n: (config.mixes(n), sum(config.kind(n)[1:])))


def kinds(config: DecoderConfig) -> dict[int, int]:
    """A layer of each kind that there is, and how many there are of it."""
    every = [config.kind(n) for n in range(config.layers)]
    return {every.index(kind): count for kind, count in Counter(every).items()}


def _rows(config: DecoderConfig, group: Solved) -> list[int]:
    return [_shape(config, group.layer, path)[-2] for path in group.paths]


def _shape(config: DecoderConfig, layer: int, path: str) -> tuple[int, ...]:
    return shapes(config)[f"blocks.{layer}.{path}.weight"]


def site_shapes(config: DecoderConfig, group: Solved) -> tuple[Any, Any, Any]:
    """What readers are compressed from: weights as one matrix, statistics, a key."""
    *experts, _, columns = _shape(config, group.layer, group.paths[0])
    init = group.method.init if observes(group.method) else None
    stats = None if init is None else jax.eval_shape(functools.partial(init, columns))
    if experts:
        stats = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*experts, *x.shape), x.dtype), stats)
    seeded = group.method.seeded
    key = jax.eval_shape(lambda: jax.random.key(0)) if seeded else None
    shape = (*experts, sum(_rows(config, group)), columns)
    return jax.ShapeDtypeStruct(shape, jnp.float32), stats, key


def observes(method: Any) -> bool:
    """Whether a method has statistics of single sites."""
    return method.observe is not None


def observe(stats: Any, x: Any, *, method: Any) -> Any:
    """Add one chunk to a site's statistics; of experts, as if one of them read all of it."""
    x = x.reshape(-1, x.shape[-1])
    paired = isinstance(method, LayerwiseMethod) and method.paired
    return method.observe(stats, x, x) if paired else method.observe(stats, x)


def compress(w: Any, stats: Any, key: Any, *, method: Any) -> Any:
    """A site's readers as one compressed matrix, or one for each expert."""
    if w.ndim == 3:
        if isinstance(method, BlockwiseMethod):
            return ExpertsTensor(jax.vmap(method.compress)(w))
        return mixtures.solve(w, stats, key, method=method)
    return method.compress(w, stats, key) if method.seeded else method.compress(w, stats)


def solve(w: Any, stats: Any, key: Any, *, method: Any) -> Any:
    """Compress, dequantize, measure the error."""
    tensor = compress(w, stats, key, method=method)
    approximation = tensor.dequantize(w.dtype)
    if isinstance(method, BlockwiseMethod):
        return tensor, approximation
    if w.ndim == 3:
        return tensor, approximation, mixtures.error(w, approximation, stats, of=method.error)
    return tensor, approximation, method.error(w, approximation, stats)


def compressed_shapes(
    config: DecoderConfig, layer: int, methods: Mapping[str, Any]
) -> dict[str, Any]:
    """One block's compressed weights by module path, as shapes.

    Raises ValueError for weights that a method cannot take.
    """
    found: dict[str, Any] = {}
    for group in groups(config, layer, methods):
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
