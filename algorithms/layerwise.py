"""One-shot compression, one linear layer at a time: the interface and the walk over one block.

A block is a chain of stages that meet at sites (see `models.sites`). The walk takes the sites in
order: bring every chunk of calibration activations to the site, observe them, compress the site's
readers as one matrix, put the result in place, go on. So each linear layer runs once, and each site
sees what its compressed predecessors produce (the "true sequential" order of the GPTQ code).
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, MutableSequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from algorithms import surgery
from algorithms.numerics import relative_error
from algorithms.tensors import CompressedTensor

Statistics = Any  # a pytree of arrays, each method's own
Block = Any  # an nnx.Module with `sites` (name, readers) and `stages()`, as in `models.decoder`
Tensors = Mapping[str, Any]  # CompressedTensor by module path; a protocol, which is not checked


def weight_error(
    w: Float[Array, "o i"], approximation: Float[Array, "o i"], stats: Statistics
) -> Float[Array, ""]:
    """‖W - Ŵ‖² / ‖W‖²; zero for a weight of zeros that stays one."""
    return relative_error(jnp.sum((w - approximation) ** 2), jnp.sum(w**2))


class LayerwiseMethod(NamedTuple):
    """A one-shot method: three pure functions, and how it measures its own error.

    `init(i)` gives empty statistics for a site with i channels, `observe(stats, x[n, i])` adds n
    activations, `compress(w[o, i], stats)` gives the compressed weight, row by row: rows of several
    readers are stacked. A method without `observe` is data-free: its statistics are None and no
    calibration runs. One that draws random numbers is `seeded`: its `compress` takes a key as
    third argument, each site its own. `notes(stats)` are numbers worth recording about a site, such
    as how many of its inputs are dead.
    """

    init: Callable[[int], Statistics] | None
    observe: Callable[[Statistics, Float[Array, "n i"]], Statistics] | None
    compress: Callable[..., CompressedTensor]
    error: Callable[[Float[Array, "o i"], Float[Array, "o i"], Statistics], Float[Array, ""]] = (
        weight_error
    )
    seeded: bool = False
    notes: Callable[[Statistics], dict[str, Array]] | None = None


class SiteReport(NamedTuple):
    """What compressing one site's readers cost."""

    site: str
    error: float | None  # relative, by the method's own measure; None where nothing is compressed
    seconds: dict[str, float]  # wall time by phase: forward, statistics, solve
    notes: dict[str, float]  # the method's own, about the site's statistics


class BlockResult(NamedTuple):
    """The compressed weights of a block by module path, and a report for each site."""

    tensors: dict[str, CompressedTensor]
    reports: list[SiteReport]


class NotFiniteError(ValueError):
    """A site's activations, weights or solution hold NaN or infinity."""


def compress_block(
    block: Block,
    chunks: MutableSequence[Any],
    method: LayerwiseMethod,
    *,
    sequential: bool = True,
    key: Array | None = None,
) -> BlockResult:
    """Compress every reader of every site of `block`, and bring `chunks` through it.

    chunks: the calibration activations at the block's input, as its stages take them; replaced one
    by one by those at its output. Ignored, and may be empty, if the method is data-free.
    sequential: whether later sites see what the compressed layers produce; if not, what the
    original ones produce.
    key: for a seeded method, this block's own.

    Raises NotFiniteError, naming the site.
    """
    tensors: dict[str, CompressedTensor] = {}
    reports = []
    for stage, site in enumerate(block.sites):
        clock = _Clock()
        stats = None
        if method.observe is not None:
            _advance(block, chunks, stage)
            clock.lap("forward")
            stats = _observe(chunks, method)
            clock.lap("statistics")
        site_key = None if key is None else jax.random.fold_in(key, stage)
        compressed, error = _compress_site(block, site, stats, site_key, method)
        tensors |= compressed
        if sequential:
            set_weights(block, compressed)
        clock.lap("solve")
        notes = {name: float(value) for name, value in _notes(stats, method).items()}
        reports.append(SiteReport(site.name, error, clock.seconds, notes))
    if method.observe is not None:
        clock = _Clock()
        _advance(block, chunks, len(block.sites))
        clock.lap("forward")
        reports.append(SiteReport("output", None, clock.seconds, {}))
    return BlockResult(tensors, reports)


def replay_block(
    block: Block,
    tensors: Tensors,
    chunks: MutableSequence[Any],
    *,
    sequential: bool = True,
) -> None:
    """Bring `chunks` through a block that was compressed before, bit for bit as it was then.

    tensors: the block's compressed weights by module path, as `compress_block` gave them.
    """
    if sequential:
        set_weights(block, tensors)
    for stage in range(len(block.sites) + 1):
        _advance(block, chunks, stage)


def set_weights(block: Block, tensors: Tensors) -> None:
    """Replace weights by the dense form of compressed ones: the same bits from the same tensors,
    whether they were just solved or read from a checkpoint.
    """
    for path, tensor in tensors.items():
        linear = surgery.linear_at(block, path)
        surgery.set_weight(linear, dense(tensor, dtype=linear.kernel[...].dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def dense(tensor: Any, *, dtype: Any) -> Float[Array, "o i"]:
    """`tensor.dequantize(dtype)` as one program of its own, not fused into whatever uses it."""
    return tensor.dequantize(dtype)


def _compress_site(block, site, stats, key, method: LayerwiseMethod):
    """The readers' compressed weights by path, and the error of all of them as one matrix."""
    weights = [surgery.get_weight(surgery.linear_at(block, path)) for path in site.readers]
    w = jnp.concatenate(weights)
    tensor = _solve(w, stats, key, method=method)
    pieces = tensor.split([piece.shape[0] for piece in weights])
    approximation = jnp.concatenate([dense(piece, dtype=w.dtype) for piece in pieces])
    error = float(_error(w, approximation, stats, method=method))
    if not math.isfinite(error):
        raise NotFiniteError(_explain(site, error, w, stats))
    return dict(zip(site.readers, pieces, strict=True)), error


class _Clock:
    """Wall seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _advance(block: Block, chunks: MutableSequence[Any], stage: int) -> None:
    graph, state = nnx.split(block)
    for n, flow in enumerate(chunks):
        chunks[n] = _run_stage(graph, state, flow, stage=stage)
    jax.block_until_ready(chunks[-1])


@functools.partial(jax.jit, static_argnames=("graph", "stage"))
def _run_stage(graph, state, flow, *, stage: int):
    return nnx.merge(graph, state).stages()[stage](flow)


def _observe(chunks: MutableSequence[Any], method: LayerwiseMethod) -> Statistics:
    assert method.init is not None
    stats = method.init(chunks[0].activation.shape[-1])
    for flow in chunks:
        stats = _add(stats, flow.activation, observe=method.observe)
    return jax.block_until_ready(stats)


@functools.partial(jax.jit, static_argnames="observe", donate_argnames="stats")
def _add(stats, activation, *, observe):
    return observe(stats, activation.reshape(-1, activation.shape[-1]))


@functools.partial(jax.jit, static_argnames="method")
def _solve(w, stats, key, *, method: LayerwiseMethod):
    return method.compress(w, stats, key) if method.seeded else method.compress(w, stats)


@functools.partial(jax.jit, static_argnames="method")
def _error(w, approximation, stats, *, method: LayerwiseMethod):
    return method.error(w, approximation, stats)


@functools.partial(jax.jit, static_argnames="method")
def _notes(stats, method: LayerwiseMethod) -> dict[str, Array]:
    return {} if method.notes is None else method.notes(stats)


def _explain(site: Any, error: float, w: Float[Array, "o i"], stats: Statistics) -> str:
    """One number suffices to find out: a NaN anywhere in weights, statistics or solution reaches
    the error. Where it came from is looked up only then.
    """
    what = f"{site.name} ({', '.join(site.readers)})"
    if not jnp.isfinite(w).all():
        return f"The weights of {what} hold NaN or infinity: the model is damaged, fetch it again."
    if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(stats)):
        return (
            f"The activations at {what} hold NaN or infinity, or overflow float32 when squared: "
            "look at the blocks before it, or at the calibration text."
        )
    return (
        f"Compressing {what} gave an error of {error}: its statistics are singular. Raise the "
        "method's damping, or calibrate on more text."
    )
