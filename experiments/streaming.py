"""The walk of the main job: blocks stream from a source through a method into a checkpoint.

One block is in memory at a time, with its statistics and one buffer of activations, so that depth
costs time and disk but no memory. An interrupted walk goes on at its next block: activations are
brought through the blocks that the checkpoint already holds by the same programs on the same
weights, so they arrive bit for bit as they were.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from algorithms.layerwise import BlockResult, LayerwiseMethod, compress_block, replay_block
from experiments import progress
from experiments.checkpoints.loading import load_blocks, load_embed
from experiments.checkpoints.planish import CheckpointWriter, part_of
from experiments.checkpoints.sources import Source, shapes
from experiments.errors import UserError
from models.decoder import Block, Flow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """How a model is walked."""

    sequential: bool = True  # later layers are calibrated on what compressed predecessors produce
    chunk: int = 4  # windows per step
    dense_dtype: str | None = "float16"  # of what stays uncompressed, on disk; None: as the source


@dataclasses.dataclass
class LayerReport:
    """One block's sites: relative error of each, and where the time went."""

    layer: int
    errors: dict[str, float]
    seconds: dict[str, float]  # by phase: read, forward, statistics, solve, write
    notes: dict[str, dict[str, float]]  # by site, the method's own: how many inputs are dead, …

    @property
    def worst(self) -> float:
        return max(self.errors.values())


def compress_model(
    source: Source,
    writer: CheckpointWriter,
    method: LayerwiseMethod,
    calibration: Int[np.ndarray, "n T"] | None,
    walk: Walk,
    *,
    seed: int = 0,
    known: Mapping[int, LayerReport] | None = None,
    report: Callable[[LayerReport], None] = lambda _: None,
) -> list[LayerReport]:
    """Compress every block of `source` into `writer`; the embedding, norms and head stay dense.

    calibration: windows of tokens; a data-free method needs none. seed: of a seeded method.
    known: reports of blocks that an interrupted walk finished; those of them that `writer` still
    holds, up to the first it does not, are not compressed again. report: called after each block.
    Raises UserError for weights that the method cannot take, before anything is read.
    """
    check_shapes(source, method)
    chunks: list[Flow] = []
    if method.observe is not None:
        assert calibration is not None
        chunks = list(embed_windows(source, calibration, walk.chunk))
    known, reports = known or {}, []
    held = _held(known, writer)
    with progress.steps("compress", source.config.layers) as step:
        blocks = load_blocks(source, start=0 if chunks else held)
        for layer in range(held):
            if chunks:
                _replay_layer(next(blocks), writer, chunks, walk, layer)
            reports.append(known[layer])
            step("kept")
        for layer in range(held, source.config.layers):
            found = _compress_layer(source, blocks, writer, method, chunks, walk, layer, seed)
            report(found)
            reports.append(found)
            step(f"error {found.worst:.2e}")
    for name in sorted(n for n in source.names() if not n.startswith("blocks.")):
        if part_of(name) not in writer.parts:
            writer.write(part_of(name), {name: dense(source, name, walk)})
    return reports


def _held(known: Mapping[int, LayerReport], writer: CheckpointWriter) -> int:
    """The blocks, from the first on without a gap, that are both written and reported."""
    layer = 0
    while layer in known and f"blocks.{layer}" in writer.parts:
        layer += 1
    return layer


def _replay_layer(block: Block, writer, chunks, walk: Walk, layer: int) -> None:
    part, prefix = writer.read(f"blocks.{layer}"), f"blocks.{layer}."
    readers = [path for site in block.sites for path in site.readers]
    tensors = {path: part.tensor(f"{prefix}{path}.weight") for path in readers}
    replay_block(block, tensors, chunks, sequential=walk.sequential)


def _compress_layer(
    source, blocks, writer, method, chunks, walk: Walk, layer: int, seed: int
) -> LayerReport:
    start = time.perf_counter()
    block = next(blocks)
    read = time.perf_counter() - start
    key = jax.random.fold_in(jax.random.key(seed), layer) if method.seeded else None
    try:
        result = compress_block(block, chunks, method, sequential=walk.sequential, key=key)
    except ValueError as error:
        raise UserError(f"Block {layer}: {error}") from error
    start = time.perf_counter()
    prefix = f"blocks.{layer}."
    tensors: dict[str, Any] = {f"{prefix}{k}.weight": v for k, v in result.tensors.items()}
    for name in source.names():
        if name.startswith(prefix) and name not in tensors:
            tensors[name] = dense(source, name, walk)
    writer.write(f"blocks.{layer}", tensors)
    seconds = {"read": read, **_by_phase(result), "write": time.perf_counter() - start}
    errors = {report.site: report.error for report in result.reports if report.error is not None}
    notes = {report.site: report.notes for report in result.reports if report.notes}
    return LayerReport(layer, errors, seconds, notes)


def _by_phase(result: BlockResult) -> dict[str, float]:
    totals: dict[str, float] = {}
    for report in result.reports:
        for phase, seconds in report.seconds.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    return totals


def embed_windows(source: Source, windows: Int[np.ndarray, "n T"], chunk: int) -> Iterator[Flow]:
    """The activations that enter the first block, `chunk` windows at a time."""
    embed = load_embed(source)
    for n in range(0, len(windows), chunk):
        tokens = jnp.asarray(windows[n : n + chunk])
        x = embed(tokens)
        yield Flow(x, x, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))


def dense(source: Source, name: str, walk: Walk) -> np.ndarray:
    """A tensor that stays as it is, in the dtype that the checkpoint keeps it in."""
    x = np.asarray(source.read(name))
    if walk.dense_dtype is None:
        return x
    with np.errstate(over="ignore"):  # refused below
        stored = x.astype(jnp.dtype(walk.dense_dtype))
    if not np.isfinite(stored).all():
        raise UserError(
            f"{name} does not fit {walk.dense_dtype}: its largest magnitude is "
            f"{np.abs(x.astype(np.float32)).max():.3g}. Set walk.dense_dtype=bfloat16."
        )
    return stored


def check_shapes(source: Source, method: LayerwiseMethod) -> None:
    """Refuse what the method cannot compress, from shapes alone: nothing is read or computed."""
    expected = shapes(source.config)
    for site in Block.sites:
        weights = [expected[f"blocks.0.{path}.weight"] for path in site.readers]
        rows, columns = sum(w[0] for w in weights), weights[0][1]
        w = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        try:
            init = method.init or (lambda i: None)  # a data-free method has no statistics
            stats = jax.eval_shape(functools.partial(init, columns))
            key = (jax.eval_shape(lambda: jax.random.key(0)),) if method.seeded else ()
            jax.eval_shape(method.compress, w, stats, *key)
        except ValueError as error:
            raise UserError(f"{site.name} ({', '.join(site.readers)}): {error}") from error
