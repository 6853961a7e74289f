"""One-shot compression, one linear layer at a time: the interface and the walk over one block.

A block is a chain of stages that meet at sites (see `models.sites`). The walk takes the sites in
order: bring every chunk of calibration activations to the site, observe them, compress the site's
readers as one matrix, put the result in place, go on. So each linear layer runs once, and each site
sees what its compressed predecessors produce (the "true sequential" order of the GPTQ code).
"""

import functools
import time
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from algorithms import surgery
from algorithms.tensors import CompressedTensor

Statistics = Any  # a pytree of arrays, each method's own
Block = Any  # an nnx.Module with `sites` (name, readers) and `stages()`, as in `models.decoder`


def weight_error(
    w: Float[Array, "o i"], approximation: Float[Array, "o i"], stats: Statistics
) -> Float[Array, ""]:
    """‖W - Ŵ‖² / ‖W‖²."""
    return jnp.sum((w - approximation) ** 2) / jnp.sum(w**2)


class LayerwiseMethod(NamedTuple):
    """A one-shot method: three pure functions, and how it measures its own error.

    `init(i)` gives empty statistics for a site with i channels, `observe(stats, x[n, i])` adds n
    activations, `compress(w[o, i], stats)` gives the compressed weight, row by row: rows of several
    readers are stacked. A method without `observe` is data-free: its statistics are None and no
    calibration runs.
    """

    init: Callable[[int], Statistics] | None
    observe: Callable[[Statistics, Float[Array, "n i"]], Statistics] | None
    compress: Callable[[Float[Array, "o i"], Statistics], CompressedTensor]
    error: Callable[[Float[Array, "o i"], Float[Array, "o i"], Statistics], Float[Array, ""]] = (
        weight_error
    )


class SiteReport(NamedTuple):
    """What compressing one site's readers cost."""

    site: str
    error: float | None  # relative, by the method's own measure; None where nothing is compressed
    seconds: dict[str, float]  # wall time by phase: forward, statistics, solve


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
) -> BlockResult:
    """Compress every reader of every site of `block`, and bring `chunks` through it.

    chunks: the calibration activations at the block's input, as its stages take them; replaced one
    by one by those at its output. Ignored, and may be empty, if the method is data-free.
    sequential: whether later sites see what the compressed layers produce; if not, what the
    original ones produce.

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
        weights = [surgery.get_weight(surgery.linear_at(block, path)) for path in site.readers]
        tensor, dense, error = _solve(jnp.concatenate(weights), stats, method=method)
        _check_finite(site, error)
        rows = [w.shape[0] for w in weights]
        tensors |= dict(zip(site.readers, tensor.split(rows), strict=True))
        if sequential:
            for path, w in zip(site.readers, _split(dense, rows), strict=True):
                surgery.set_weight(surgery.linear_at(block, path), w)
        clock.lap("solve")
        reports.append(SiteReport(site.name, float(error), clock.seconds))
    if method.observe is not None:
        clock = _Clock()
        _advance(block, chunks, len(block.sites))
        clock.lap("forward")
        reports.append(SiteReport("output", None, clock.seconds))
    return BlockResult(tensors, reports)


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
def _solve(w, stats, *, method: LayerwiseMethod):
    tensor = method.compress(w, stats)
    dense = tensor.dequantize(w.dtype)
    return tensor, dense, method.error(w, dense, stats)


def _split(w: Float[Array, "o i"], rows: Sequence[int]) -> list[Float[Array, "p i"]]:
    starts = [sum(rows[:n]) for n in range(len(rows))]
    return [w[start : start + n] for start, n in zip(starts, rows, strict=True)]


def _check_finite(site: Any, error: Float[Array, ""]) -> None:
    """One number suffices: a NaN anywhere in the weights, statistics or solution reaches it."""
    if not jnp.isfinite(error):
        raise NotFiniteError(
            f"Compressing the readers of {site.name} ({', '.join(site.readers)}) gave an error of "
            f"{error}: its weights or activations hold NaN or infinity, or its statistics are "
            "singular (raise the method's damping, or calibrate on more text)."
        )
