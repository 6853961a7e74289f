"""The walk over one block: observe each site, compress its readers, go on.

A block is a chain of stages that meet at sites (see `models.sites`). The walk takes the sites in
order: bring every chunk of calibration activations to the site, observe them, compress the site's
readers as one matrix, put the result in place, go on. So each linear layer runs once, and each site
sees what its compressed predecessors produce (the "true sequential" order of the GPTQ code). A
`SiteTransform` comes before and sees the block as it is: one more forward pass. With
`sequential="block"`, the order of most official codes of pruning, all of a block's sites see it as
it is, and then its activations go through what became of it.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from algorithms import mixtures, surgery
from algorithms.layerwise import LayerwiseMethod, SiteTransform, Statistics, add
from algorithms.modules import CompressedExperts, CompressedLinear
from algorithms.tensors import CompressedTensor, DenseTensor, ExpertsTensor
from algorithms.tensors.sparse import padded

Block = Any  # an nnx.Module with `sites` (name, readers) and `stages()`, as in `models.decoder`
MethodOf = Callable[[str], LayerwiseMethod | None]  # by module path; None: the layer stays dense


class SiteReport(NamedTuple):
    """What compressing one site's readers cost."""

    site: str
    error: float | None  # relative, by the method's own measure; None where nothing is compressed
    seconds: dict[str, float]  # wall time by phase: forward, statistics, solve
    notes: dict[str, Any]  # the method's own, about the site's statistics; experts unreached


class BlockResult(NamedTuple):
    """The compressed weights of a block by module path, and a report for each site."""

    tensors: dict[str, CompressedTensor]
    reports: list[SiteReport]


class Original(NamedTuple):
    """The block as it computes before it is compressed, and the activations that reach it in the
    original model; they move on with the walk's own.
    """

    block: Block
    chunks: MutableSequence[Any]


class NotFiniteError(ValueError):
    """A site's activations, weights or solution hold NaN or infinity."""


def compress_block(
    block: Block,
    chunks: MutableSequence[Any],
    method_of: MethodOf,
    *,
    sequential: bool | str = True,
    key: Array | None = None,
    original: Original | None = None,
) -> BlockResult:
    """Compress the readers of every site of `block`, and bring `chunks` through it.

    chunks: the calibration activations at the block's input, as its stages take them; replaced one
    by one by those at its output. May be empty where no method looks at data.
    sequential: whether later sites see what the compressed layers produce: True, False, or "block"
    for those of later blocks alone.
    key: for seeded methods, this block's own.
    original: for paired methods; as many chunks, of the same windows.

    Raises NotFiniteError, naming the site.
    """
    tensors: dict[str, CompressedTensor] = {}
    reports, entered = [], list(chunks) if sequential == "block" else []
    for stage, site in enumerate(block.sites):
        clock = Clock()
        if chunks:
            _advance_both(block, chunks, original, stage)
            clock.lap("forward")
        site_key = None if key is None else jax.random.fold_in(key, stage)
        found = _compress_site(
            block, site, chunks, original, method_of, site_key, clock, replace=sequential is True
        )
        if sequential is True:
            set_weights(block, found.tensors)
        tensors |= found.tensors
        clock.lap("solve")
        error = max(found.errors, default=None)
        reports.append(SiteReport(site.name, error, clock.seconds, found.notes))
    if chunks:
        clock = Clock()
        if sequential == "block":
            chunks[:] = entered
            replay_block(block, tensors, chunks, sequential="block")
            if original is not None:
                advance(original.block, original.chunks, len(block.sites))
        else:
            _advance_both(block, chunks, original, len(block.sites))
        clock.lap("forward")
        reports.append(SiteReport("output", None, clock.seconds, {}))
    return BlockResult(tensors, reports)


class _Site(NamedTuple):
    tensors: dict[str, CompressedTensor]
    errors: list[float]
    notes: dict[str, Any]


def _compress_site(
    block, site, chunks, original, method_of, key, clock: "Clock", *, replace: bool
) -> _Site:
    """Observe once for each kind of statistics, and compress what one method takes together.

    replace: whether the compressed weights take the place of the original ones, which are then let
    go of on the way.
    """
    rows = {path: surgery.weight_shape(surgery.linear_at(block, path))[-2] for path in site.readers}
    groups, found = grouped(rows, method_of), _Site({}, [], {})
    seen = {}
    for method, _ in groups:
        if method.observe is not None and method.observe not in seen:
            seen[method.observe], notes = observe_site(block, site, chunks, method, original)
            found.notes.update(notes)
    if seen:
        clock.lap("statistics")
    for n, (method, paths) in enumerate(groups):
        stats = None if method.observe is None else seen[method.observe]
        own = key if key is None or n == 0 else jax.random.fold_in(key, n)
        tensors, error = _compress(block, site, paths, stats, own, method, replace=replace)
        found.tensors.update(tensors)
        found.errors.append(error)
        notes = (mixtures.notes if site.experts else _notes)(stats, of=method.notes)
        found.notes.update({k: float(value) for k, value in notes.items()})
    return found


def observe_site(
    block: Block,
    site: Any,
    chunks: Sequence[Any],
    method: LayerwiseMethod,
    original: Original | None = None,
) -> tuple[Statistics, dict[str, Any]]:
    """The statistics of a site that the chunks are at, of each expert where it has experts, and
    what is worth noting of them.
    """
    if not site.experts:
        return observe(chunks, method, original), {}
    found = mixtures.observe(block, site, chunks, method)
    return found.stats, {"unreached_experts": found.unreached} if found.unreached else {}


def replay_block(
    block: Block,
    tensors: Mapping[str, Any],
    chunks: MutableSequence[Any],
    *,
    sequential: bool | str = True,
) -> None:
    """Bring `chunks` through a block that was compressed before, bit for bit as it was then.

    block: with the dense weights that the walk left it with. tensors: its compressed weights by
    module path, as `compress_block` gave them.
    """
    if sequential == "block":
        set_weights(block, tensors)
    for stage, site in enumerate(block.sites):
        advance(block, chunks, stage)
        if sequential is True:
            set_weights(block, {path: tensors[path] for path in site.readers if path in tensors})
    advance(block, chunks, len(block.sites))


def transform_block(block: Block, chunks: Sequence[Any], transform: SiteTransform) -> None:
    """Scale every site that can take it; `chunks`, at the block's input, are left as they are."""
    moving, stats = list(chunks), []
    for stage, _ in enumerate(block.sites):
        advance(block, moving, stage)
        stats.append(observe(moving, transform))
    for site, seen in zip(block.sites, stats, strict=True):
        if site.absorbs_scale:
            w = jnp.concatenate([surgery.get_weight(surgery.linear_at(block, path))
                                 for path in site.readers])  # fmt: skip
            scale = _scale(w, seen, transform=transform)
            if not bool(jnp.isfinite(scale).all() & (scale > 0).all()):
                raise NotFiniteError(explain(site.name, site.readers, math.nan, w, seen))
            surgery.absorb_scale(block, site, scale)


def set_weights(block: Block, tensors: Mapping[str, Any]) -> None:
    """Put compressed weights into the block, unpacked once for the many chunks to come.

    The same bits from the same tensors, whether they were just solved or read from a checkpoint.
    """
    for path, tensor in tensors.items():
        linear = surgery.linear_at(block, path)
        unpacked = unpack(tensor, dtype=linear.kernel.get_value().dtype)
        plain = unpacked.stacked if isinstance(unpacked, ExpertsTensor) else unpacked
        if isinstance(plain, DenseTensor):
            surgery.set_weight(linear, plain.weight)
        else:
            surgery.compress_linear(block, path, unpacked)


def unpack_layers(block: nnx.Module, dtype: Any = jnp.float32) -> None:
    """Unpack every compressed layer of a block, once for the many chunks to come."""
    for _, module in nnx.iter_modules(block):
        if isinstance(module, CompressedLinear | CompressedExperts):
            module.weight.set_value(unpack(module.tensor, dtype=dtype))


def unpack(tensor: Any, *, dtype: Any) -> Any:
    """`tensor.unpacked(dtype)` as one program of its own, not fused into whatever uses it."""
    return _unpacked(padded(tensor), dtype=dtype)


def dense(tensor: Any, *, dtype: Any) -> Float[Array, "*e o i"]:
    """`tensor.dequantize(dtype)` as one program of its own."""
    return _dense(padded(tensor), dtype=dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _unpacked(tensor, *, dtype):
    return tensor.unpacked(dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _dense(tensor, *, dtype):
    return tensor.dequantize(dtype)


def grouped(rows: Mapping[str, int], method_of: Callable[[str], Any]) -> list[tuple[Any, list]]:
    """A site's readers by what compresses them as one matrix: methods, each with its paths.

    rows: of every reader, by module path.
    """
    groups: list[tuple[Any, list[str]]] = []
    for path, count in rows.items():
        method = method_of(path)
        if method is None:
            continue
        stackable = method.row_block is None or count % method.row_block == 0
        if isinstance(method, LayerwiseMethod):
            stackable &= method.stacked
        last = next((g for g in groups if g[0] is method and stackable), None)
        if last is None:
            groups.append((method, [path]))
        else:
            last[1].append(path)
    return groups


def _compress(block, site, paths: list[str], stats, key, method: LayerwiseMethod, *, replace: bool):
    """The compressed weights of `paths`, and the error of all of them as one matrix."""
    solve, measure = (mixtures.solve, mixtures.error) if site.experts else (_solve, _error)
    layers = [surgery.linear_at(block, path) for path in paths]
    # Each is let go of as soon as it is not needed: two such matrices can be a block of the model.
    w = jnp.concatenate(list(map(surgery.get_weight, layers)), -2)
    if replace:
        for layer in layers:
            surgery.release_weight(layer)
    tensor = solve(w, stats, key, method=method)
    error = float(measure(w, dense(tensor, dtype=w.dtype), stats, of=method.error))
    if not math.isfinite(error):
        raise NotFiniteError(explain(site.name, paths, error, w, stats))
    pieces = tensor.split([surgery.weight_shape(layer)[-2] for layer in layers])
    return dict(zip(paths, pieces, strict=True)), error


class Clock:
    """Wall seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def advance(block: Block, chunks: MutableSequence[Any], stage: int) -> None:
    """Bring every chunk through one stage."""
    graph, state = nnx.split(block)
    for n, flow in enumerate(chunks):
        chunks[n] = run_stage(graph, state, flow, stage=stage)
    jax.block_until_ready(chunks[-1])


def through(block: Block, chunks: MutableSequence[Any]) -> None:
    """Bring every chunk through a whole block; there may be none."""
    if chunks:
        for stage in range(len(block.sites) + 1):
            advance(block, chunks, stage)


def _advance_both(block: Block, chunks, original: Original | None, stage: int) -> None:
    advance(block, chunks, stage)
    if original is not None:
        advance(original.block, original.chunks, stage)


@functools.partial(jax.jit, static_argnames=("graph", "stage"))
def run_stage(graph, state, flow, *, stage: int):
    return nnx.merge(graph, state).stages()[stage](flow)


def observe(chunks: Sequence[Any], method: Any, original: Original | None = None) -> Statistics:
    """The statistics of the activations that the chunks hold now."""
    stats, flows = method.init(chunks[0].activation.shape[-1]), [chunks]
    if isinstance(method, LayerwiseMethod) and method.paired:
        assert original is not None
        flows.append(original.chunks)
    for pair in zip(*flows, strict=True):
        stats = add(stats, *(flow.activation for flow in pair), observe=method.observe)
    return jax.block_until_ready(stats)


@functools.partial(jax.jit, static_argnames="method")
def _solve(w, stats, key, *, method: LayerwiseMethod):
    return method.compress(w, stats, key) if method.seeded else method.compress(w, stats)


@functools.partial(jax.jit, static_argnames="transform")
def _scale(w, stats, *, transform: SiteTransform):
    return transform.scale(w, stats)


@functools.partial(jax.jit, static_argnames="of")
def _error(w, approximation, stats, *, of: Callable[..., Any]):
    return of(w, approximation, stats)


@functools.partial(jax.jit, static_argnames="of")
def _notes(stats, *, of: Callable[..., Any] | None) -> dict[str, Array]:
    return {} if of is None else of(stats)


def explain(
    site: str, paths: Sequence[str], error: float, w: Float[Array, "*e o i"], stats: Statistics
) -> str:
    """Why something at a site is not finite.

    One number suffices to find out that it is: a NaN anywhere in weights, statistics or solution
    reaches the error. Where it came from is looked up only then.
    """
    what = f"{site} ({', '.join(paths)})"
    if not jnp.isfinite(jnp.sum(w**2)):
        return (
            f"The weights of {what} hold NaN or infinity, or overflow float32 when squared: the "
            "model is damaged, fetch it again."
        )
    if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(stats)):
        return (
            f"The activations at {what} hold NaN or infinity, or overflow float32 when squared: "
            "look at the blocks before it, or at the calibration text."
        )
    return (
        f"Compressing {what} gave an error of {error}: its statistics are singular. Raise the "
        "method's damping, or calibrate on more text."
    )
