"""A library of alternatives to a model's blocks: made, trained and scored one block at a time, with
one block of the model in memory; read back by whoever chooses from it.

    library/blocks.3.safetensors    the alternatives of block 3 that have weights

A block's rows come after its file, so that what an interrupted run noted is there. What enters a
block is what the parent's own blocks make of the text, in training and in scoring alike.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from algorithms import surgery
from algorithms.blockwise import BlockwiseMethod, learn_block
from algorithms.numerics import relative_error
from algorithms.walk import advance, set_weights, through
from experiments import memory, progress
from experiments.checkpoints.loading import load_block, load_blocks, parameters
from experiments.checkpoints.planish import Part, write_part
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.searching import walks
from experiments.streaming import embed_windows
from experiments.structures.alternatives import (
    ATTENTION,
    FEED_FORWARD,
    PARTS,
    Alternative,
    cost,
    made,
    whole,
    within,
)
from experiments.structures.assembled import FILE, assembled
from experiments.structures.observing import require_finite
from experiments.untrusted import DAMAGE
from models.block import Block, Flow
from models.config import DecoderConfig
from models.decoder import readers

type Row = dict[str, Any]  # of one block, as the journal and the record keep it


class Job(NamedTuple):
    """What a library is made of."""

    source: Source
    alternatives: tuple[Alternative, ...]
    method: BlockwiseMethod | None  # that trains them; None: they stay as they are made
    train: Int[np.ndarray, "n T"]  # windows
    score: Int[np.ndarray, "m T"]
    chunk: int  # windows per step
    context: int
    latency_tokens: int
    seed: int  # of the order of windows


def make(
    job: Job,
    folder: Path,
    known: Mapping[int, Row],
    report: Callable[[Row], None],
    check: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The rows of all blocks, their tensors in `folder`. Those that are known, whose file is whole,
    are not made again. check: called before a file is put in place; it raises if it must not be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {layer: row for layer, row in known.items() if _held(folder, layer)}
    layers = job.source.config.layers
    if len(rows) < layers:
        base = walks.last(walks.Model(job.source, job.score, job.chunk))
        flows = [
            list(embed_windows(job.source, each, job.chunk)) for each in (job.train, job.score)
        ]
        with progress.steps("library", layers) as step:
            for layer, block in enumerate(load_blocks(job.source)):
                known_here = layer in rows
                row = _block_row(job, folder, layer, block, flows, base, check, again=known_here)
                if not known_here:
                    rows[layer] = row
                    report(row)
                surgery.release(block)
                memory.give_back()
                step("")
    return [rows[layer] for layer in range(layers)]


def _block_row(
    job: Job,
    folder: Path,
    layer: int,
    block: Block,
    flows: list[list[Flow]],
    base: Sequence[Flow],
    check: Callable[[], None],
    *,
    again: bool,
) -> Row:
    """A block's alternatives and their scores; the flows, of training and of scoring, leave it.

    again: the block is known, and passed through alone.
    """
    train, score = flows
    entered = list(train), list(score)
    activity = _through(block, train)
    require_finite(layer, train)
    through(block, score)
    if again:
        return {}
    parent, config = parameters(block), job.source.config
    branches, found, stored = [], [], {}
    for n, each in enumerate(job.alternatives):
        if each.size == whole(config)[each.part]:
            branches.append(score)
            found.append({"before": 0.0, "after": 0.0})
            continue
        tensors = made(config, each, parent, activity)
        student = load_block(assembled(job.source, layer, each, tensors), layer)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(job.seed), layer), n)
        found.append(_trained(job, layer, student, each, entered[0], train, key))
        branches.append(list(entered[1]))
        through(student, branches[-1])
        ours = {name: x for name, x in parameters(student).items()
                if name.split(".")[0] in PARTS[each.part]}  # fmt: skip
        stored |= {f"{each.name}.{name}": x for name, x in ours.items()}
        surgery.release(student)
    write_part(_file(folder, layer), stored, check)
    model = walks.Model(job.source, job.score, job.chunk)
    scores = _scores(model, layer, job.alternatives, branches, base)
    return {"layer": layer, "scores": scores, "losses": found}


def _scores(
    model: walks.Model,
    layer: int,
    alternatives: Sequence[Alternative],
    branches: Sequence[list[Flow]],
    base: Sequence[Flow],
) -> list[float]:
    """KL of the model's predictions with each alternative in place; of the parent's own, 0."""
    own = whole(model.source.config)
    changed = [n for n, each in enumerate(alternatives) if each.size != own[each.part]]
    found = walks.divergences(model, layer, [branches[n] for n in changed], base)
    if bad := [
        alternatives[n].name for n, kl in zip(changed, found, strict=True) if not kl < jnp.inf
    ]:
        raise UserError(
            f"Block {layer}: with {bad[0]} in its place the model's predictions are not finite: "
            "lower structure.learning_rate."
        )
    scores = dict(zip(changed, found, strict=True))
    return [scores.get(n, 0.0) for n in range(len(alternatives))]


def _trained(
    job: Job,
    layer: int,
    student: Block,
    alternative: Alternative,
    inputs: Sequence[Flow],
    targets: Sequence[Flow],
    key: Array,
) -> dict[str, float]:
    """Train what is the alternative's own; the relative error of the block before and after."""
    sizes = (alternative.sizes(job.source.config),) * job.source.config.layers
    changed = dataclasses.replace(job.source.config, blocks=sizes)
    own = [
        path for path in readers(changed, layer) if path.split(".")[0] in PARTS[alternative.part]
    ]
    if not own or job.method is None:
        error = _error(student, inputs, targets)
        return {"before": error, "after": error}
    try:
        methods = dict.fromkeys(own, job.method)
        tensors, loss = learn_block(student, inputs, targets, methods, key)
    except ValueError as error:
        raise UserError(f"Block {layer}, {alternative.name}: {error}") from error
    set_weights(student, tensors)
    return {"before": loss.first, "after": loss.last}


def _error(student: Block, inputs: Sequence[Flow], targets: Sequence[Flow]) -> float:
    moving = list(inputs)
    through(student, moving)
    pairs = zip(moving, targets, strict=True)
    error = sum(jnp.sum((a.residual - b.residual) ** 2) for a, b in pairs)
    return float(relative_error(error, sum(jnp.sum(flow.residual**2) for flow in targets)))


def _through(block: Block, chunks: list[Flow]) -> Float[np.ndarray, " F"]:
    """Bring all chunks through the block; the mean magnitude of what enters its last projection."""
    for stage, site in enumerate(block.sites):
        advance(block, chunks, stage)
        if site.name == "mlp.hidden":
            total = sum(_magnitude(flow.activation) for flow in chunks)
            count = sum(flow.positions.size for flow in chunks)
    advance(block, chunks, len(block.sites))
    return np.asarray(total / count)


@jax.jit
def _magnitude(x: Float[Array, "B T F"]) -> Float[Array, " F"]:
    return jnp.abs(x.astype(jnp.float32)).sum((0, 1))


def _file(folder: Path, layer: int) -> Path:
    return folder / FILE.format(layer)


def _held(folder: Path, layer: int) -> bool:
    """Whether a block's file is whole; one that is not, goes."""
    if not (path := _file(folder, layer)).is_file():
        return False
    try:
        Part(path)
    except (UserError, *DAMAGE):
        path.unlink()
        return False
    return True


def costs_of(
    config: DecoderConfig, alternatives: Sequence[Alternative], context: int, latency_tokens: int
) -> list[dict[str, float]]:
    """What each alternative costs in any block, measured once."""
    settings = {"context": context, "latency_tokens": latency_tokens}
    return [cost(config, each, **settings) for each in alternatives]


def weights_of(config: DecoderConfig, alternatives: Sequence[Alternative]) -> int:
    """Numbers that one block's file holds."""
    own = whole(config)
    kept = [each for each in alternatives if each.size != own[each.part]]
    return int(sum(np.prod(shape) for each in kept for shape in within(config, each).values()))


def units_of(alternatives: Sequence[Alternative]) -> dict[str, list[int]]:
    """The alternatives of each part, by number."""
    return {
        part: [n for n, each in enumerate(alternatives) if each.part == part]
        for part in (ATTENTION, FEED_FORWARD)
    }


def parents(config: DecoderConfig) -> list[Alternative]:
    """What a block of the model as it is has."""
    return [Alternative(part, size) for part, size in whole(config).items()]
