"""What a run will take, from shapes alone: nothing is read, computed or held.

Operations come from the jaxprs of the model's and the method's own functions, so that any method is
estimated, a user's own too. Memory is what the walk holds at its fullest moment. Time is operations
at the machine's product rate. The constants were measured with SmolLM2-135M on two cores of a CPU;
`measurements.estimates` compares estimates with runs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from algorithms.blockwise import BlockwiseMethod
from experiments import programs
from experiments.checkpoint_size import Kind, checkpoint_bytes, kinds_of, tensors_of
from experiments.checkpoints.sources import shapes
from experiments.evaluation import logits
from experiments.operations import Work, size, work
from experiments.recipes import Recipe, Structure
from experiments.streaming import Walk
from models.block import Flow
from models.config import DecoderConfig
from models.decoder import build_block, sites

# Copies of a dense tensor, as float32, while it is read: the file's own, dequantized, placed. And
# while it is cast to be written, to half as much: where the source gives views of its files, only
# what it becomes. Measured: 312 MB for an embedding of 113 MB; 0.5 and 0 copies of one of 2.1 GB.
READING = 2.75
WRITING = {False: 1.5, True: 0.5}
# Calls whose intermediates are held at once: a CPU begins calls before earlier ones have ended.
# Measured: 170 to 250 MB while the losses are computed, of which one call needs 53.
CALLS = 4
# Arrays below LARGE bytes, once freed, stay with the process until a block is done
# (`experiments.memory`) and fit few later ones. The most that the walk held of them costs KEPT
# times as much. Measured with 8, 32 and 128 windows: 1.8 to 2.0. 0 where it is given back at once.
LARGE = 1 << 25
KEPT = 1.85
# Operations of products that could run while one byte is moved to or from memory: 25 GB/s where
# products run at 2e11, fitted to the solves of GPTQ, which are half of each.
BYTE = 8.0
OVERHEAD = 1.1  # of a run over its operations, for what is not counted; fitted to the five runs
COMPILING = 0.004  # seconds for an equation: 6.7 measured for the 1879 of GPTQ, 1.1 for RTN's 276
# Seconds to read and dequantize, or to digest and write, one parameter: RTN does little else, and
# takes 4 to 5 for two passes over 135 million and its compilation.
HANDLING = 10e-9
STARTING = 4.0  # seconds to import, open the model and encode the text


class Estimate(NamedTuple):
    """What a run takes. Bytes and seconds are by phase: compress and evaluate."""

    parameters: int
    operations: dict[str, float]  # by part: forward, statistics, solve, evaluate
    memory: dict[str, int]  # the most at any moment
    seconds: dict[str, float]
    disk: int  # of the checkpoint, which grows under its folder's name and `.partial`

    @property
    def peak(self) -> int:
        return max(self.memory.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def facts(self) -> dict[str, Any]:
        """For the record: what was expected, beside what came."""
        return {
            "memory": self.memory,
            "seconds": self.seconds,
            "operations": self.operations,
            "disk": self.disk,
        }

    def evaluated(self, times: int) -> "Estimate":
        """The same with its evaluation repeated."""
        operations, seconds = ({**part, "evaluate": times * part["evaluate"]}
                               for part in (self.operations, self.seconds))  # fmt: skip
        return self._replace(operations=operations, seconds=seconds)


class Held(NamedTuple):
    """Arrays of one size."""

    copies: float
    bytes: int


class _Phase(NamedTuple):
    parts: dict[str, Work]  # over the whole model
    equations: int  # of all programs: each is compiled once
    memory: int  # bytes held at the fullest moment


type Windows = tuple[int, int]  # how many, and tokens of each


def estimate(
    config: DecoderConfig,
    recipe: Recipe | None,
    *,
    calibration: Windows | None,
    heldout: Windows,
    walk: Walk,
    evaluation_chunk: int,
    views: bool,
    rate: float | int,
    base: int,
    original: DecoderConfig | None = None,
) -> Estimate:
    """Of compressing by `recipe` and evaluating the result; of evaluating alone where it is None.

    original: of the model that the recipe's structure makes one of `config` of.
    views: whether the source gives views of its files (`Source.views`).
    rate: floating-point operations per second of products. base: bytes of the process before any
    work (`hardware.process_memory`). Raises ValueError for weights that the method cannot take.
    """
    parameters = sum(math.prod(shape) for shape in shapes(config).values())
    kinds = {} if recipe is None else kinds_of(config, recipe)
    phases: dict[str, _Phase] = {}
    if recipe is not None:
        compress = _compress(config, recipe, kinds, calibration, walk, views)
        if recipe.structure is not None and calibration is not None:
            scoring = _scoring(original or config, recipe.structure, calibration, walk)
            compress = compress._replace(
                parts=scoring.parts | compress.parts,
                equations=scoring.equations + compress.equations,
                memory=max(scoring.memory, compress.memory),
            )
        phases["compress"] = compress
    phases["evaluate"] = _evaluate(config, kinds, heldout, evaluation_chunk)
    memory = {name: base + phase.memory for name, phase in phases.items()}
    operations = {k: w.operations for p in phases.values() for k, w in p.parts.items()}
    seconds = {"start": STARTING}
    for name, phase in phases.items():
        passes = 2 if name == "compress" else 1  # over the parameters: read, and written
        seconds[name] = _seconds(phase, rate) + passes * HANDLING * parameters
    return Estimate(
        parameters=parameters,
        operations=operations,
        memory=memory,
        seconds=seconds,
        disk=0 if recipe is None else checkpoint_bytes(config, recipe, kinds, walk),
    )


def _seconds(phase: _Phase, rate: float | int) -> float:
    total = sum(phase.parts.values(), Work())
    return OVERHEAD * (total.products + BYTE * total.moved) / rate + COMPILING * phase.equations


def _compress(
    config: DecoderConfig,
    recipe: Recipe,
    kinds: Mapping[Kind, int],
    calibration: Windows | None,
    walk: Walk,
    views: bool,
) -> _Phase:
    windows, context = (calibration or (0, 0)) if recipe.needs_data(config) else (0, 0)
    chunk = min(walk.chunk, windows)
    copies = windows / chunk if windows else 0.0
    embed = 4 * config.vocabulary * config.hidden
    typical = programs.typical(config)
    # The next block is read ahead: out of files that are mapped, into the system's own memory.
    resident = _arrays(_block(config, typical)[1], 1 if views else 2)
    entry = programs.flow_shapes(config, chunk, context)
    # Beside the walk's own: a scaling's look ahead; what the original model has, on the way and at
    # the end of a block that is learned, and before and after scaling.
    scaled = int(recipe.transform is not None)
    aimed = int(recipe.pairs) * (1 + scaled)
    streams = scaled + aimed + 2 * int(recipe.learns) + int(walk.sequential == "block")
    resident += _arrays(entry, streams * copies)
    rows = 4 * config.hidden * min(config.vocabulary, windows * context)  # of the embedding
    forward, moments = Work(), [[Held(READING, rows)]] if windows else []
    flow = entry
    for found, after in _stages(config, typical, chunk, context) if windows else ():
        forward += found
        # Chunks pass one by one: there are never more than all the old or all the new.
        chunks = _arrays(max(flow, after, key=size), copies)
        moments.append(resident + chunks + [Held(CALLS, found.temporaries)])
        flow = after
    parts, equations = {}, forward.equations
    if windows:
        every = _forward(config, chunk, context)
        parts["forward"], equations = every.times((1 + streams) * copies), every.equations
    if recipe.rotation is not None and recipe.rotation.descent[0]:
        parts["rotation"], held = _descent(config, *recipe.rotation.descent)
        moments.append(held)
    for kind, count in kinds.items():
        stages = _stages(config, kind.layer, chunk, context) if windows else []
        flows = [after for _, after in stages]
        sites, more = _sites(config, kind, flows, copies)
        moments += [resident + moment for moment in more]
        for part, found in sites.items():
            parts[part] = parts.get(part, Work()) + found.times(count)
            equations += found.equations
        own = sum((found for found, _ in stages), Work())
        parts["solve"] = parts["solve"] + _learning(kind, own, chunk).times(count)
    moments.append(resident + _arrays(flow, copies) + [Held(WRITING[views], embed)])
    if not windows:
        parts.pop("statistics", None)
    kept = KEPT * max(map(_small, moments)) if jax.default_backend() == "cpu" else 0.0
    most = max(*map(_total, moments), kept)
    return _Phase(parts, equations, int(most))


def _stages(config: DecoderConfig, layer: int, chunk: int, context: int) -> list[tuple[Work, Flow]]:
    """Work of each stage of a block over one chunk, and the chunk after it."""
    flow, found = programs.flow_shapes(config, chunk, context), []
    for stage in range(len(sites(config, layer)) + 1):
        one, flow = _stage(config, layer, stage, flow)
        found.append((one, flow))
    return found


def _forward(config: DecoderConfig, chunk: int, context: int) -> Work:
    """Of all blocks over one chunk."""
    total = Work()
    for layer, count in programs.kinds(config).items():
        stages = _stages(config, layer, chunk, context)
        total += sum((found for found, _ in stages), Work()).times(count)
    return total


def _descent(config: DecoderConfig, steps: int, tokens: int) -> tuple[Work, list[Held]]:
    """Of learning a rotation: all blocks, kept in memory beside the ends, once there, once again
    for the way back, and back, which takes twice as much.
    """
    typical = programs.typical(config)
    blocks = _forward(config, 1, tokens)
    head = Work(products=2.0 * tokens * config.hidden * config.vocabulary)
    total = blocks.times(4 * steps) + head.times(3 * steps)
    ends = Held(2, 4 * config.vocabulary * config.hidden)  # never tied, once turned
    between = _arrays(programs.flow_shapes(config, 1, tokens).residual, config.layers)
    passing = [Held(CALLS, blocks.temporaries), Held(2, 4 * tokens * config.vocabulary)]
    # As read, and stacked to be scanned.
    kept = _arrays(_block(config, typical)[1], 2 * config.layers)
    return total, [*kept, ends, *between, *passing]


def _scoring(
    config: DecoderConfig, structure: Structure, calibration: Windows, walk: Walk
) -> _Phase:
    """Of finding what stays of a model: passes over its blocks, with one of them in memory."""
    (windows, context), (passes, streams) = calibration, structure.effort(config)
    if not passes:
        return _Phase({}, 0, 0)
    chunk, typical = min(walk.chunk, windows), programs.typical(config)
    blocks = _forward(config, chunk, context)
    entry = programs.flow_shapes(config, chunk, context)
    held = _arrays(_block(config, typical)[1], 3) + _arrays(entry, (1 + streams) * windows / chunk)
    held += [Held(CALLS, blocks.temporaries), Held(READING, 4 * config.vocabulary * config.hidden)]
    total = blocks.times(passes * windows / chunk)
    return _Phase({"structure": total}, total.equations, int(_total(held)))


def _learning(kind: Kind, forward: Work, chunk: int) -> Work:
    """Of a learned method's steps: a gradient takes twice a forward pass, beside the pass."""
    learned = [m for _, m in kind.methods if isinstance(m, BlockwiseMethod)]
    if not learned:
        return Work()
    return forward.times(3 * learned[0].steps * learned[0].batch / chunk)


def _sites(
    config: DecoderConfig, kind: Kind, flows: list[Flow], copies: float
) -> tuple[dict[str, Work], list[list[Held]]]:
    """Work of one block's statistics, over all chunks, and of its solves; what they hold."""
    names = [site.name for site in sites(config, kind.layer)]
    parts, moments = {"statistics": Work(), "solve": Work()}, []
    for group in programs.groups(config, kind.layer, dict(kind.methods)):
        flow = flows[names.index(group.site.name)] if flows else None
        seen, solved, needed = _group(config, group, flow)
        parts["statistics"] += seen.times(copies)
        parts["solve"] += solved
        moments.append([*([] if flow is None else _arrays(flow, copies)), *needed])
    return parts, moments


def _group(
    config: DecoderConfig, group: programs.Solved, flow: Flow | None
) -> tuple[Work, Work, list[Held]]:
    """Work of a site's statistics, over one chunk, and of its solve; what the two hold."""
    w, stats, _ = programs.site_shapes(config, group)
    seen = Work()
    if flow is not None and programs.observes(group.method):
        one = stats
        if group.site.experts:
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stats)
        seen = work(functools.partial(programs.observe, method=group.method), one, flow.activation)
    solved = _solve(config, group)
    pieces = _arrays(w)  # as it was; as one matrix of all readers it takes the block's place
    passing = Held(1, max(seen.temporaries, solved.temporaries))
    return seen, solved, [*_arrays(stats), *pieces, passing]


# Kept from one estimate to the next: those that a refusal tries differ in few of these.
@functools.cache
def _solve(config: DecoderConfig, group: programs.Solved) -> Work:
    shapes = programs.site_shapes(config, group)
    return work(functools.partial(programs.solve, method=group.method), *shapes)


@functools.cache
def _block(config: DecoderConfig, layer: int) -> tuple[Any, Any]:
    return programs.split(lambda: build_block(config, layer, rngs=nnx.Rngs(0)))


@functools.cache
def _stage(config: DecoderConfig, layer: int, stage: int, flow: Flow) -> tuple[Work, Flow]:
    """Work of a stage over one chunk, and the chunk after it."""
    graph, state = _block(config, layer)
    run = functools.partial(programs.run_stage, graph, stage=stage)
    return work(run, state, flow), jax.eval_shape(run, state, flow)


@functools.cache
def _evaluation(
    config: DecoderConfig, kind: Kind, chunk: int, context: int
) -> tuple[Work, Work, int]:
    """Work of a block and of the losses over one chunk, and the bytes of a block."""
    tensors = {
        path: jax.eval_shape(lambda t: t.unpacked(jnp.float32), tensor)
        for path, tensor in tensors_of(config, kind).items()
    }
    x = programs.flow_shapes(config, chunk, context).residual
    positions = jax.ShapeDtypeStruct((1, context), jnp.int32)
    graph, state = programs.split(
        lambda: programs.quantized(build_block(config, kind.layer, rngs=nnx.Rngs(0)), tensors)
    )
    block = work(functools.partial(programs.run_block, graph), state, x, positions)
    rows, predicted = logits.rows_at_once(config), chunk * (context - 1)
    part = dataclasses.replace(config, vocabulary=rows)
    last, head = programs.split(lambda: programs.last(part))
    states = jax.ShapeDtypeStruct((predicted, config.hidden), jnp.float32)
    tokens = jax.ShapeDtypeStruct((predicted,), jnp.int32)
    seen = jax.eval_shape(lambda: logits.nothing(predicted))
    losses = work(functools.partial(logits.see, last), head, states, tokens, seen)
    return block, losses.times(config.vocabulary / rows), size(state)


def _evaluate(
    config: DecoderConfig, kinds: Mapping[Kind, int], heldout: Windows, chunk: int
) -> _Phase:
    """kinds: what a recipe makes; of the layers of one shape, the commonest stands for all."""
    (windows, context), chunk = heldout, min(chunk, heldout[0])
    blocks, weights, losses = Work(), 0, Work()
    for layer, count in programs.kinds(config).items():
        alike = [k for k in kinds if config.kind(k.layer) == config.kind(layer)]
        kind = max(alike, key=lambda k: kinds[k], default=Kind(layer, ()))
        block, losses, size_ = _evaluation(config, kind, chunk, context)
        blocks, weights = blocks + block.times(count), max(weights, size_)
    tokens = windows * context
    beside = 4 * tokens * (config.hidden + 1)  # activations and tokens
    rows = 4 * config.hidden * min(config.vocabulary, tokens)  # of the embedding
    head = 4 * config.hidden * logits.rows_at_once(config)
    memory = max(
        beside + READING * rows,
        beside + 2 * weights + CALLS * blocks.temporaries,
        beside + READING * head + CALLS * losses.temporaries,
    )
    steps = windows / chunk
    total = blocks.times(steps) + losses.times(steps)
    return _Phase({"evaluate": total}, total.equations, int(memory))


def _arrays(tree: Any, copies: float | int = 1) -> list[Held]:
    return [Held(copies, size(leaf)) for leaf in jax.tree.leaves(tree)]


def _total(moment: list[Held]) -> float:
    return float(sum(held.copies * held.bytes for held in moment))


def _small(moment: list[Held]) -> float:
    return _total([held for held in moment if held.bytes < LARGE])
