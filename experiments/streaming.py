"""The walk of the main job: blocks stream from a source through a method into a checkpoint.

One block is in memory at a time, with its statistics and one buffer of activations, so that depth
costs time and disk but no memory. An interrupted walk goes on at its next block: activations are
brought through the blocks that the checkpoint already holds by the same programs on the same
weights, so they arrive bit for bit as they were.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from algorithms import kv_cache, surgery
from algorithms.blockwise import BlockwiseMethod, learn_block
from algorithms.tensors import CompressedTensor
from algorithms.walk import (
    BlockResult,
    Clock,
    Original,
    SiteReport,
    advance,
    compress_block,
    replay_block,
    through,
    transform_block,
)
from experiments import memory, progress
from experiments.checkpoints.loading import load_blocks, parameters, put
from experiments.checkpoints.planish import CheckpointWriter, part_of
from experiments.checkpoints.sources import Source, count_not_finite, shapes
from experiments.errors import UserError
from experiments.evaluation.forward import embedded, in_chunks
from experiments.recipes import ENDS, Recipe
from models.block import Block, Flow
from models.decoder import sites


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """How a model is walked."""

    # Whether later layers are calibrated on what compressed predecessors produce; "block": only
    # those of later blocks, with one pass more over a block.
    sequential: Any = True  # bool | "block"; whatever was written, so that a sentence refuses it
    chunk: int = 4  # windows per step
    dense_dtype: str | None = "float16"  # of what stays uncompressed, on disk; None: as the source

    def __post_init__(self) -> None:
        if not isinstance(self.sequential, bool) and self.sequential != "block":
            raise ValueError(f"sequential={self.sequential!r} must be true, false or block.")


@dataclasses.dataclass
class LayerReport:
    """One block's sites: relative error of each, and where the time went."""

    layer: int
    errors: dict[str, float]
    seconds: dict[str, float]  # by phase: read, forward, statistics, solve, write
    notes: dict[str, dict[str, Any]]  # by site, the method's own: how many inputs are dead, …

    @property
    def worst(self) -> float | None:
        """None where nothing was compressed."""
        return max(self.errors.values(), default=None)


def compress_model(
    source: Source,
    writer: CheckpointWriter,
    recipe: Recipe,
    calibration: Int[np.ndarray, "n T"] | None,
    walk: Walk,
    *,
    seed: int = 0,
    known: Mapping[int, LayerReport] | None = None,
    report: Callable[[LayerReport], None] = lambda _: None,
) -> list[LayerReport]:
    """Compress every block of `source` into `writer`; norms stay dense, and so do the embedding and
    the head unless a rule of the recipe names them.

    calibration: windows of tokens; a data-free recipe needs none. seed: of seeded methods.
    known: reports of blocks that an interrupted walk finished; those of them that `writer` still
    holds, up to the first it does not, are not compressed again. report: called after each block.
    Raises UserError for weights that a method cannot take, before anything is read.
    """
    check_shapes(source, recipe)
    state = _State(source, writer, recipe, walk, seed)
    if recipe.needs_data(source.config):
        assert calibration is not None
        state.chunks = list(embed_windows(source, calibration, walk.chunk))
        if recipe.learns or recipe.pairs:
            state.targets = list(state.chunks)
    known, reports = known or {}, []
    held = _held(known, writer)
    with progress.steps("compress", source.config.layers) as step:
        blocks = load_blocks(source, start=0 if state.chunks else held)
        for layer in range(held):
            if state.chunks:
                _replay_layer(state, next(blocks), layer)
                memory.give_back()
            reports.append(known[layer])
            step("kept")
        for layer in range(held, source.config.layers):
            found = _compress_layer(state, blocks, layer)
            report(found)
            reports.append(found)
            step("" if found.worst is None else f"error {found.worst:.2e}")
            memory.give_back()
    _write_ends(state)
    return reports


@dataclasses.dataclass
class _State:
    """What the walk holds between blocks."""

    source: Source
    writer: CheckpointWriter
    recipe: Recipe
    walk: Walk
    seed: int
    chunks: list[Flow] = dataclasses.field(default_factory=list)
    targets: list[Flow] = dataclasses.field(default_factory=list)  # as the original model has them


def _held(known: Mapping[int, LayerReport], writer: CheckpointWriter) -> int:
    """The blocks, from the first on without a gap, that are both written and reported."""
    layer = 0
    while layer in known and f"blocks.{layer}" in writer.parts:
        layer += 1
    return layer


def _replay_layer(state: _State, block: Block, layer: int) -> None:
    part, prefix = state.writer.read(f"blocks.{layer}"), f"blocks.{layer}."
    through(block, state.targets)
    found = {name.removeprefix(prefix): part.tensor(name) for name in part.trees}
    dense = {n: x for n, x in found.items() if not isinstance(x, CompressedTensor)}
    if state.recipe.transform is not None:
        put(block, dense)
    put(block, {n: x for n, x in dense.items() if n.endswith(kv_cache.SCALES)})
    compressed = {
        name.removesuffix(".weight"): tensor
        for name, tensor in found.items() if isinstance(tensor, CompressedTensor)
    }  # fmt: skip
    replay_block(block, compressed, state.chunks, sequential=state.walk.sequential)
    surgery.release(block)


def _compress_layer(state: _State, blocks: Iterator[Block], layer: int) -> LayerReport:
    start = time.perf_counter()
    block = next(blocks)
    read = time.perf_counter() - start
    key = jax.random.fold_in(jax.random.key(state.seed), layer)
    methods = state.recipe.block(state.source.config, layer)
    original = _originals(state, block)
    clock = Clock()
    before: Original | None = None
    try:
        scales = _fit_cache(state, block)
        changed = _transform(state, block, layer)
        if changed:
            scales = _fit_cache(state, block)
        changed |= scales
        clock.lap("transform")
        if any(isinstance(m, BlockwiseMethod) for m in methods.values()):
            result = _learn(state, block, methods, key)
        else:
            if original is not None:
                before = Original(kv_cache.exact(block), original)
            result = compress_block(
                block, state.chunks, methods.__getitem__,  # type: ignore[arg-type]
                sequential=state.walk.sequential, key=key, original=before,
            )  # fmt: skip
    except ValueError as error:
        raise UserError(f"Block {layer}: {error}") from error
    start = time.perf_counter()
    for done in (block, *([] if before is None else [before.block])):
        surgery.release(done)
    state.writer.write(f"blocks.{layer}", _tensors(state, layer, result, changed))
    own = clock.seconds if state.recipe.transform is not None else {}
    seconds = {"read": read, **own, **_by_phase(result), "write": time.perf_counter() - start}
    errors = {report.site: report.error for report in result.reports if report.error is not None}
    notes = {report.site: report.notes for report in result.reports if report.notes}
    return LayerReport(layer, errors, seconds, notes)


def _originals(state: _State, block: Block) -> list[Flow] | None:
    """Bring the targets through the block before it is transformed, as a resumed walk does; for
    paired methods, what entered it.
    """
    if not state.recipe.pairs:
        through(block, state.targets)
        return None
    if state.recipe.transform is None:
        return state.targets  # which move on with the walk's own
    entered = list(state.targets)
    through(block, state.targets)
    return entered


def _fit_cache(state: _State, block: Block) -> dict[str, np.ndarray]:
    """Scales of keys and values, by name within the block, where the recipe rounds them: of what
    the block's projections give before they are compressed.
    """
    if state.recipe.cache is None:
        return {}
    moving = list(state.chunks)
    if block.has_attention:
        advance(block, moving, 0)
    kv_cache.fit(block, moving)
    held = parameters(block)
    return {name: held[name] for name in held if name.endswith(kv_cache.SCALES)}


def _transform(state: _State, block: Block, layer: int) -> dict[str, np.ndarray]:
    """Transform the block, and round what stays dense as the checkpoint keeps it: the walk goes on
    with what is stored. What was changed, by name within the block.
    """
    if state.recipe.transform is None:
        return {}
    transform_block(block, state.chunks, state.recipe.transform)
    methods = state.recipe.block(state.source.config, layer)
    compressed = {f"{p}.weight" for p, m in methods.items() if m is not None}
    stored = {
        name: dense(state.source, f"blocks.{layer}.{name}", state.walk, x)
        for name, x in parameters(block).items() if name not in compressed
    }  # fmt: skip
    put(block, stored)
    return stored


def _learn(state: _State, block: Block, methods: Mapping[str, Any], key: Any) -> BlockResult:
    """One block of a learned method, towards the targets; activations go through it."""
    clock, inputs = Clock(), list(state.chunks)
    learned = {path: m for path, m in methods.items() if m is not None}
    # Rounding has no slope that a method could learn by.
    exact = kv_cache.exact(block)
    tensors, loss = learn_block(exact, inputs, state.targets, learned, key)
    surgery.release(exact)
    clock.lap("solve")
    replay_block(block, tensors, state.chunks, sequential=state.walk.sequential)
    clock.lap("forward")
    notes = {"loss_before": loss.first, "loss_after": loss.last}
    return BlockResult(tensors, [SiteReport("block", loss.last, clock.seconds, notes)])


def _tensors(
    state: _State, layer: int, result: BlockResult, changed: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """All of a block's tensors by full name: compressed ones, and what stays dense."""
    prefix = f"blocks.{layer}."
    tensors: dict[str, Any] = {f"{prefix}{k}.weight": v for k, v in result.tensors.items()}
    tensors |= {f"{prefix}{name}": x for name, x in changed.items()}
    for name in state.source.names():
        if name.startswith(prefix) and name not in tensors:
            tensors[name] = dense(state.source, name, state.walk)
    return tensors


def _write_ends(state: _State) -> None:
    """What lies outside the blocks."""
    outside = sorted(n for n in state.source.names() if not n.startswith("blocks."))
    for part, names in itertools.groupby(outside, part_of):
        if part not in state.writer.parts:
            state.writer.write(part, {name: _end(state, name) for name in names})


def _end(state: _State, name: str) -> Any:
    """The embedding, the head or the last norm, as the checkpoint keeps it."""
    path = name.removesuffix(".weight")
    method = state.recipe.method(path) if path in ENDS else None
    if method is None:
        return dense(state.source, name, state.walk)
    w = jnp.asarray(state.source.read(name), jnp.float32)
    key = (jax.random.key(state.seed),) if method.seeded else ()
    return jax.jit(method.compress)(w, None, *key)


def _by_phase(result: BlockResult) -> dict[str, float]:
    totals: dict[str, float] = {}
    for report in result.reports:
        for phase, seconds in report.seconds.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    return totals


def embed_windows(source: Source, windows: Int[np.ndarray, "n T"], chunk: int) -> Iterator[Flow]:
    """The activations that enter the first block, `chunk` windows at a time."""
    for x in embedded(source, in_chunks(windows, chunk)):
        yield Flow(x, x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))


def dense(source: Source, name: str, walk: Walk, changed: np.ndarray | None = None) -> np.ndarray:
    """A tensor that is not compressed, in the dtype that the checkpoint keeps it in.

    changed: what a transform made of it.
    """
    x = np.asarray(source.read(name))
    if changed is not None:
        x = changed.astype(x.dtype)
    if name.endswith(kv_cache.SCALES):
        return x
    if walk.dense_dtype is None or changed is None and str(x.dtype) == walk.dense_dtype:
        return x
    with np.errstate(over="ignore"):  # refused below
        stored = x.astype(jnp.dtype(walk.dense_dtype), copy=False)
    if count_not_finite(stored):
        raise UserError(
            f"{name} does not fit {walk.dense_dtype}: its largest magnitude is "
            f"{np.abs(x.astype(np.float32)).max():.3g}. Set walk.dense_dtype=bfloat16."
        )
    return stored


def check_shapes(source: Source, recipe: Recipe) -> None:
    """Refuse what a method cannot compress, from shapes alone: nothing is read or computed."""
    expected = shapes(source.config)
    done = set()
    for layer in range(source.config.layers):
        methods = recipe.block(source.config, layer)
        for site in sites(source.config, layer):
            for path in site.readers:
                method, shape = methods[path], expected[f"blocks.{layer}.{path}.weight"][-2:]
                if method is not None and (method, shape) not in done:
                    done.add((method, shape))
                    _check_shape(method, shape, f"{site.name} ({path})")
    for path in ENDS:
        method = recipe.method(path)
        if method is not None and f"{path}.weight" in expected:
            _check_shape(method, expected[f"{path}.weight"], path)


def _check_shape(method: Any, shape: tuple[int, ...], where: str) -> None:
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        stats = None  # of a method that looks at no site
        if method.observe is not None:
            stats = jax.eval_shape(functools.partial(method.init, shape[1]))
        key = (jax.eval_shape(lambda: jax.random.key(0)),) if method.seeded else ()
        jax.eval_shape(method.compress, w, stats, *key)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
