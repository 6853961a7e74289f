"""A library of alternatives to a model's blocks: made, trained and scored one block at a time, with
one block of the model in memory; read back by whoever chooses from it.

    library/blocks.3.safetensors    the alternatives of block 3 that have weights

A block's rows come after its file, so that what an interrupted run noted is there. What enters a
block is what the parent's own blocks make of the text, in training and in scoring alike.
"""

import math
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
    if len(rows) == layers:
        return [rows[layer] for layer in range(layers)]
    base = walks.last(walks.Model(job.source, job.score, job.chunk))
    flows = [list(embed_windows(job.source, each, job.chunk)) for each in (job.train, job.score)]
    with progress.steps("library", layers) as step:
        for layer, block in enumerate(load_blocks(job.source)):
            entered = [list(each) for each in flows]
            activity = _through(block, flows[0])
            through(block, flows[1])
            require_finite(layer, flows[0])
            if layer not in rows:
                alternatives = _Tried(job, layer, parameters(block), activity, entered, flows)
                rows[layer], tensors = _tried(alternatives, base)
                write_part(folder / FILE.format(layer), tensors, check)
                report(rows[layer])
            surgery.release(block)
            memory.give_back()
            step("")
    return [rows[layer] for layer in range(layers)]


class _Tried(NamedTuple):
    """A block whose alternatives are to be tried."""

    job: Job
    layer: int
    parent: Mapping[str, np.ndarray]  # its tensors, by name within it
    activity: Float[np.ndarray, " F"]  # of each channel of its feed-forward layer
    entered: list[list[Flow]]  # of windows to train on, and to score on: what enters it,
    left: list[list[Flow]]  # and what leaves it


def _tried(at: _Tried, base: Sequence[Flow]) -> tuple[Row, dict[str, np.ndarray]]:
    """A block's row, and its alternatives' tensors by their name and that within the block.

    base: what the model's last activations are.
    """
    config, alternatives = at.job.source.config, at.job.alternatives
    losses, branches, tensors = [], dict[int, list[Flow]](), dict[str, np.ndarray]()
    for n, each in enumerate(alternatives):
        if each.size == whole(config)[each.part]:
            losses.append({"before": 0.0, "after": 0.0})
            continue
        cut = made(config, each, at.parent, at.activity)
        student = load_block(assembled(at.job.source, at.layer, each, cut), at.layer)
        losses.append(_trained(at, n, student))
        branches[n] = list(at.entered[1])
        through(student, branches[n])
        tensors |= {f"{each.name}.{name}": x for name, x in parameters(student).items()
                    if name.split(".")[0] in PARTS[each.part]}  # fmt: skip
        surgery.release(student)
    scores = _scores(at, branches, base)
    return {"layer": at.layer, "scores": scores, "losses": losses}, tensors


def _scores(at: _Tried, branches: Mapping[int, list[Flow]], base: Sequence[Flow]) -> list[float]:
    """KL of the model's predictions with each alternative in place; of the parent's own, 0."""
    model = walks.Model(at.job.source, at.job.score, at.job.chunk)
    found = walks.divergences(model, at.layer, list(branches.values()), base)
    scores = dict(zip(branches, found, strict=True))
    if bad := [n for n, kl in scores.items() if not math.isfinite(kl)]:
        raise UserError(
            f"Block {at.layer}: with {at.job.alternatives[bad[0]].name} in its place the model's "
            "predictions are not finite: lower structure.learning_rate."
        )
    return [scores.get(n, 0.0) for n in range(len(at.job.alternatives))]


def _trained(at: _Tried, n: int, student: Block) -> dict[str, float]:
    """Train what is the alternative's own; the relative error of the block before and after."""
    alternative, method = at.job.alternatives[n], at.job.method
    inputs, targets = at.entered[0], at.left[0]
    own = [path for site in student.sites for path in site.readers
           if path.split(".")[0] in PARTS[alternative.part]]  # fmt: skip
    if not own or method is None:
        error = _error(student, inputs, targets)
        return {"before": error, "after": error}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(at.job.seed), at.layer), n)
    try:
        tensors, loss = learn_block(student, inputs, targets, dict.fromkeys(own, method), key)
    except ValueError as error:
        raise UserError(f"Block {at.layer}, {alternative.name}: {error}") from error
    set_weights(student, tensors)
    return {"before": loss.first, "after": loss.last}


def _error(student: Block, inputs: Sequence[Flow], targets: Sequence[Flow]) -> float:
    moving = list(inputs)
    through(student, moving)
    lost = [jnp.sum((a.residual - b.residual) ** 2) for a, b in zip(moving, targets, strict=True)]
    given = [jnp.sum(flow.residual**2) for flow in targets]
    return float(relative_error(jnp.sum(jnp.stack(lost)), jnp.sum(jnp.stack(given))))


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


def _held(folder: Path, layer: int) -> bool:
    """Whether a block's file is whole; one that is not, goes."""
    if not (path := folder / FILE.format(layer)).is_file():
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
