"""The model's blocks, one after another, each measured where it stands in the model as it is.

Three ways: forward, for what a layer's own activations say; there and back, for what gradients say;
and forward with the rest of the model for each option, for what its predictions say. A block that
an earlier attempt measured is passed through and not measured again.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from algorithms import surgery
from algorithms.layerwise import SiteTransform
from algorithms.walk import through, transform_block
from experiments import memory, progress
from experiments.checkpoints.loading import load_block, load_blocks
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.evaluation import logits
from experiments.evaluation.forward import in_chunks
from experiments.streaming import embed_windows
from models.block import Block, Flow

type Row = dict[str, Any]
type Known = Mapping[int, Sequence[Row]]  # by block
type Report = Callable[[int, list[Row]], None]


class Model(NamedTuple):
    """What is walked, and on what."""

    source: Source
    windows: Int[np.ndarray, "n T"] | None  # None: no activations are looked at
    chunk: int
    transform: SiteTransform | None = None


def forward(
    model: Model,
    measure: Callable[[int, Block, list[Flow]], list[Row]],
    known: Known,
    report: Report,
) -> list[Row]:
    """The rows of all blocks. measure: of a block, with the activations that enter it."""
    rows, chunks = dict(known), _entering(model)
    with progress.steps("search", model.source.config.layers) as step:
        for layer, block in _blocks(model, chunks):
            if layer not in rows:
                of_block = functools.partial(measure, layer, block, chunks)
                rows[layer] = _reported(report, layer, of_block)
            through(block, chunks)
            _leave(block)
            step("")
    return [row for layer in sorted(rows) for row in rows[layer]]


def backward(
    model: Model,
    measure: Callable[[int, Block, list[Flow], list[dict[str, Any]]], list[Row]],
    paths: Callable[[int], Sequence[str]],
    known: Known,
    report: Report,
) -> list[Row]:
    """The same with ∂L/∂y of the layers at `paths`, of each chunk: from the last block to the
    first, so that what enters every block is kept.
    """
    rows, chunks, entered = dict(known), _entering(model), []
    for _, block in _blocks(model, chunks):
        entered.append(list(chunks))
        through(block, chunks)
        _leave(block)
    pulls = _at_the_end(model, chunks)
    with progress.steps("search", model.source.config.layers) as step:
        for layer in reversed(range(model.source.config.layers)):
            if all(n in rows for n in range(layer + 1)):
                break
            block = load_block(model.source, layer)
            flows = entered.pop()
            _transformed(model, block, flows)
            found = [_pulled(block, flow, pull, paths(layer))
                     for flow, pull in zip(flows, pulls, strict=True)]  # fmt: skip
            pulls, g = [pull for pull, _ in found], [own for _, own in found]
            if layer not in rows:
                of_block = functools.partial(measure, layer, block, flows, g)
                rows[layer] = _reported(report, layer, of_block)
            _leave(block)
            step("")
    return [row for layer in sorted(rows) for row in rows[layer]]


def divergences(
    model: Model, layer: int, branches: Sequence[list[Flow]], base: Sequence[Flow]
) -> list[float]:
    """Of each branch, which left block `layer` with something changed in it: how far the model's
    predictions are from those of `base`, the last activations as they are, in nats per token.
    """
    branches = [list(branch) for branch in branches]
    for block in load_blocks(model.source, start=layer + 1):
        for branch in branches:
            through(block, branch)
        _leave(block)
    ends = [_rows(branch) for branch in branches]
    found = logits.divergences(model.source, _rows(base), ends)
    return [float(jnp.mean(each)) for each in found]


def last(model: Model) -> list[Flow]:
    """The last activations of the model as it is."""
    chunks = _entering(model)
    for _, block in _blocks(model, chunks):
        through(block, chunks)
        _leave(block)
    return chunks


def _entering(model: Model) -> list[Flow]:
    if model.windows is None:
        return []
    return list(embed_windows(model.source, model.windows, model.chunk))


def _blocks(model: Model, chunks: list[Flow]) -> Iterator[tuple[int, Block]]:
    for layer, block in enumerate(load_blocks(model.source)):
        _transformed(model, block, chunks)
        yield layer, block


def _transformed(model: Model, block: Block, chunks: list[Flow]) -> None:
    """Options are of the weights that a compression finds, once its scaling has been there."""
    if model.transform is not None:
        transform_block(block, chunks, model.transform)


def _leave(block: Block) -> None:
    surgery.release(block)
    memory.give_back()


def _reported(report: Report, layer: int, measure: Callable[[], list[Row]]) -> list[Row]:
    try:
        rows = measure()
    except ValueError as error:
        raise UserError(f"Block {layer}: {error}") from error
    report(layer, rows)
    return rows


def _rows(chunks: Sequence[Flow]) -> Float[Array, "n D"]:
    """Positions that a token follows, of all windows."""
    return jnp.concatenate([x[:, :-1].reshape(-1, x.shape[-1]) for x, *_ in chunks])


def _at_the_end(model: Model, chunks: Sequence[Flow]) -> list[Float[Array, "B T D"]]:
    """∂L/∂x of the last activations."""
    assert model.windows is not None
    batches = in_chunks(model.windows, model.chunk)
    return logits.loss_gradients(model.source, [flow.residual for flow in chunks], batches)


class Probed(nnx.Module):
    """A linear layer with something added to its output, by which that is differentiated."""

    def __init__(self, linear: Any, probe: Float[Array, "B T o"]):
        self.linear, self.probe = linear, nnx.Variable(probe)

    def __call__(self, x: Float[Array, "B T i"]) -> Float[Array, "B T o"]:
        return self.linear(x) + self.probe[...]


def _pulled(
    block: Block, flow: Flow, pull: Float[Array, "B T D"], paths: Sequence[str]
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """∂L/∂x of what enters a block and ∂L/∂y of its layers, by ∂L/∂x of what leaves it."""
    graph, state = nnx.split(block)
    return _pull_block(graph, state, flow, pull, paths=tuple(paths))


@functools.partial(jax.jit, static_argnames=("graph", "paths"))
def _pull_block(graph, state, flow, pull, *, paths: tuple[str, ...]):
    outputs = {
        path: surgery.weight_shape(surgery.linear_at(nnx.merge(graph, state), path))[-2]
        for path in paths
    }
    probes = {p: jnp.zeros((*flow.positions.shape, o)) for p, o in outputs.items()}

    def run(x, probes):
        block = nnx.merge(graph, state, copy=True)
        for path, probe in probes.items():
            surgery.replace(block, path, Probed(surgery.linear_at(block, path), probe))
        return block(x, flow.positions)[0]

    _, back = jax.vjp(run, flow.residual, probes)
    return back(pull)
