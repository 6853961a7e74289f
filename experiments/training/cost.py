"""What a training run takes, from shapes alone: nothing is read, computed or held."""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from algorithms import training
from algorithms.distillation.compressed_logits import LogitCodec
from algorithms.training import Batch, Objective, Parts
from experiments import hardware
from experiments.estimate import Estimate
from experiments.operations import size, work
from experiments.training.data import Examples
from experiments.training.loop import Pace
from experiments.training.subject import outlined

OVERHEAD = 1.5  # of a run over its operations at the rate of products, for what is not counted
# On a CPU, measured on models of 42 and 135 million parameters:
UNFUSED = 2.0  # what XLA holds over what ideally fused programs would: 1.7 and 2.5
SAVING = 3  # states: the copy that is written, and what Orbax makes of it
STARTING = 6.0  # seconds to import, open the model and encode the text


def estimate(
    plain: dict[str, Any], shapes: Parts, examples: Examples, objective: Objective,
    optimizer: optax.GradientTransformation, pace: Pace, teacher: Any,
) -> Estimate:  # fmt: skip
    state = jax.eval_shape(
        lambda parts: training.init(parts, optimizer, jax.random.key(0)),
        shapes._replace(graph=None),
    )
    graph, others = (None, None) if teacher is None else nnx.split(outlined(teacher))
    batch = _batch(examples.train, plain["batch"])
    heldout = _batch(examples.heldout, plain["evaluation_batch"])
    if teacher is not None and (codec := getattr(objective, "codec", None)):
        batch, heldout = (
            each._replace(taught=_stored(codec, teacher, each)) for each in (batch, heldout)
        )
        graph = others = None
    common = {"graph": shapes.graph, "teacher_graph": graph, "objective": objective,
              "dtype": plain["dtype"]}  # fmt: skip
    found = work(  # the calls of the loop: these traces are theirs
        training.step, state, shapes.fixed, others, batch, optimizer=optimizer,
        accumulate=plain["accumulate"], layout=None, **common,
    )  # fmt: skip
    mask = jax.ShapeDtypeStruct(heldout.targets.shape, "float32")  # of `filled`
    seen = work(
        training.evaluate, state.params, state.buffers, shapes.fixed, others,
        heldout._replace(mask=mask), jax.eval_shape(jax.random.key, 0), **common,
    )  # fmt: skip
    chunks = -(-len(examples.heldout.inputs) // plain["evaluation_batch"])
    looks = 1 if pace.evaluate_every is None else -(-pace.steps // pace.evaluate_every)
    operations = {"train": pace.steps * found.operations, "look": chunks * looks * seen.operations}
    machine = hardware.Hardware(**plain["hardware"])
    parameters = sum(x.size for x in jax.tree.leaves((shapes.params, shapes.fixed)))
    held = size(state) + size(shapes.fixed) + size(others) + _bytes(examples)
    rate = machine.assumed_rate()
    seconds = {part: OVERHEAD * count / rate for part, count in operations.items()}
    return Estimate(
        parameters=parameters,
        operations=operations,
        memory={"train": hardware.process_memory() + held + _beside(state, found.temporaries)},
        seconds={"start": STARTING, **seconds},
        disk=pace.keep * size(state) + size(shapes.params) + size(shapes.fixed),
    )


def floor(found: Estimate, steps: int) -> float:
    """Seconds that a step's operations take at the machine's rate of products."""
    return found.seconds["train"] / OVERHEAD / steps


def _beside(state: Any, temporaries: int) -> int:
    """Bytes beside what is held all the time: of a step, and of saving."""
    if jax.default_backend() != "cpu":
        return temporaries
    return int(UNFUSED * temporaries) + SAVING * size(state) + size(state.params)


def _stored(codec: LogitCodec, teacher: Any, batch: Batch) -> Any:
    """What the codec makes of the teacher's logits on a batch, without memory."""
    logits = jax.ShapeDtypeStruct((*batch.targets.shape, teacher.config.vocabulary), "float32")
    key = (jax.random.key(0),) if codec.seeded else ()
    return jax.eval_shape(codec.encode, logits, *key)


def _batch(data: Batch, count: int) -> Batch:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), data)


def _bytes(examples: Examples) -> int:
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves((examples.train, examples.heldout)))
