"""What a training run would do and take, worked out from its configuration before it begins."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from omegaconf import DictConfig
from rich.table import Table

from algorithms import training
from algorithms.distillation.compressed_logits import LogitCodec
from algorithms.optimizers.groups import named
from algorithms.parametrization import Parametrization
from algorithms.training import Batch, Objective, Parts
from experiments import hardware
from experiments.checkpoints.loading import load_model, outline
from experiments.checkpoints.sources import Source, require_predictions
from experiments.data.windows import Windows
from experiments.entry import build, resolved
from experiments.errors import UserError
from experiments.estimate import Estimate
from experiments.operations import size, work
from experiments.progress import console
from experiments.training.building import assigned, build_optimizer, build_schedule
from experiments.training.data import Examples, Order, next_tokens
from experiments.training.loop import Job, Pace
from experiments.training.parallel import Devices

# Seconds of one step over its operations at the rate of products alone; bytes over what the
# program's order of operations holds. Fitted to the runs of `measurements.estimates`.
OVERHEAD = 1.5
STARTING = 6.0  # seconds to import, open the model and encode the text


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's parts, opened but not loaded, and what they will take."""

    config: DictConfig
    model: Any  # a source, or what makes a module of random keys
    teacher: Any  # the same, or None
    examples: Examples
    windows: Windows | None  # of a language model
    objective: Objective
    optimizer: optax.GradientTransformation
    order: Order
    pace: Pace
    evaluation: Any
    estimate: Estimate
    shapes: Parts  # of the model, without memory
    mesh: Mesh | None

    @property
    def source(self) -> Source | None:
        return self.model if isinstance(self.model, Source) else None

    def require(self, folder: Path) -> None:
        """Refuse a run that memory or disk will not hold; raises UserError with the numbers."""
        machine = hardware.Hardware(**resolved(self.config)["hardware"])
        memory, found = machine.assumed_memory(), self.estimate
        hardware.require(found, memory=memory, folder=folder, alternatives=iter(()))
        console.print(
            f"about {hardware.duration(found.total_seconds)}, {hardware.gigabytes(found.peak)} of "
            f"memory, {hardware.gigabytes(found.disk)} of disk: {folder}",
            soft_wrap=True,
        )

    def show(self) -> None:
        """Print which parameters are learned by which optimizer, and the estimate."""
        drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("parameter", "shape", "optimizer"):
            drawn.add_column(name, overflow="fold")
        groups = assigned(self.config, self.shapes.params)
        for name, leaf in named(self.shapes.params).items():
            drawn.add_row(name, str(tuple(leaf.shape)), groups[name])
        fixed = sum(x.size for x in jax.tree.leaves(self.shapes.fixed))
        if fixed:
            drawn.add_row("(fixed)", f"{fixed:,} numbers", "none")
        console.print(drawn)
        console.print(hardware.describe(self.estimate))

    def facts(self) -> dict[str, Any]:
        """What a record says of the model."""
        if self.source is not None:
            found = self.source.facts()
        else:
            found = {"location": str(self.config.model._target_).rpartition(".")[-1]}
        taught = {"teacher": self.teacher.facts()} if isinstance(self.teacher, Source) else {}
        return {**found, "parameters": self.estimate.parameters, **taught}

    def recipe(self) -> list[dict[str, Any]]:
        """The steps that travel with the checkpoint."""
        plain = resolved(self.config)
        return [{"_target_": "experiments.train", "steps": plain["steps"], "loss": plain["loss"],
                 "optimizer": plain["optimizer"]}]  # fmt: skip

    def job(self) -> Job:
        """Everything loaded."""
        plain = resolved(self.config)
        module = self._module(plain["seeds"]["init"])
        _set_remat(self.config, module)
        _parametrize(self.config, module, jax.random.key(plain["seeds"]["init"]))
        graph = teacher = None
        if self.teacher is not None:
            taught = self._teaching()
            _prepare(self.objective, module, taught, jax.random.key(plain["seeds"]["init"]))
            graph, teacher = nnx.split(taught)
        parts = training.take_apart(module, learned(self.config))
        return Job(
            parts, self.objective, self.optimizer, self.examples, self.order, self.pace,
            seed=plain["seeds"]["method"], accumulate=plain["accumulate"], dtype=plain["dtype"],
            teacher_graph=graph, teacher=teacher, schedule=build_schedule(self.config),
            mesh=self.mesh,
            config=getattr(self.model, "config", None),
            teacher_config=getattr(self.teacher, "config", None),
        )  # fmt: skip

    def _teaching(self) -> Any:
        teacher: Any = self.teacher
        return load_model(teacher) if isinstance(teacher, Source) else teacher(rngs=nnx.Rngs(0))

    def _module(self, seed: int) -> nnx.Module:
        return load_model(self.source) if self.source is not None else self.model(
            rngs=nnx.Rngs(seed)
        )  # fmt: skip


def plan(config: DictConfig) -> Plan:
    """Open what the configuration names and estimate; raises UserError for what cannot be run."""
    plain = resolved(config)
    model = build(config, "model")
    if not isinstance(model, Source) and not callable(model):
        raise UserError("model: an endpoint gives no weights to train: choose a model to train.")
    teacher = None if config.get("teacher") is None else build(config, "teacher")
    windows, examples = _data(config, plain, model)
    if teacher is not None:
        _require_alike(model, teacher)
    pace = Pace(**{f.name: plain[f.name] for f in dataclasses.fields(Pace)})
    order = Order(
        len(examples.train.inputs), plain["batch"], plain["seeds"]["data"], plain["passes"]
    )
    order.require(pace.steps)
    if plain["batch"] % plain["accumulate"]:
        raise UserError(f"accumulate={plain['accumulate']} must divide batch={plain['batch']}.")
    mesh = Devices(**plain["mesh"]).mesh(
        getattr(model, "config", None), plain["batch"] // plain["accumulate"]
    )
    if plain["remat"] and not isinstance(model, Source):
        raise UserError("remat=true: a classifier has no blocks to compute anew: choose false.")
    optimizer, objective = _optimizer(config), build(config, "loss")
    try:
        shapes = training.take_apart(_abstract(config, model, objective, teacher), learned(config))
    except ValueError as error:
        raise UserError(str(error)) from error
    assigned(config, shapes.params)
    try:
        found = _estimate(plain, shapes, examples, objective, optimizer, pace, teacher)
    except ValueError as error:  # of the objective: shapes alone went through it
        raise UserError(f"loss: {str(error).splitlines()[0]}") from error
    return Plan(
        config, model, teacher, examples, windows, objective, optimizer, order, pace,
        build(config, "evaluation"), found, shapes, mesh,
    )  # fmt: skip


def _optimizer(config: DictConfig) -> optax.GradientTransformation:
    """With what the parametrizations put around it."""
    found = build_optimizer(config)
    for each in _parametrizations(config):
        found = found if each.around is None else each.around(found)
    return found


def _data(config: DictConfig, plain: dict[str, Any], model: Any) -> tuple[Windows | None, Examples]:
    data, seed = build(config, "data"), plain["seeds"]["data"]
    if not isinstance(model, Source):
        if not hasattr(data, "examples"):
            raise UserError(
                "data: a text, which the model does not read: choose data=digits or data=mnist1d, "
                "or a language model."
            )
        return None, data.examples(seed)
    if not hasattr(data, "windows"):
        raise UserError("data: no text, which the model reads: choose data=enwiki or data=text.")
    require_predictions(model.config, "tokens to be trained on")
    windows = data.windows(
        model.tokenizer(), model.config.vocabulary, longest=model.config.context, seed=seed
    )
    return windows, next_tokens(windows)


def _require_alike(model: Any, teacher: Any) -> None:
    """Refuse a teacher that speaks of other tokens, or of other classes."""
    if isinstance(teacher, Source) != isinstance(model, Source):
        raise UserError("teacher: a language model teaches a language model: choose both so.")
    if not isinstance(model, Source):
        found = [nnx.eval_shape(lambda: each(rngs=nnx.Rngs(0))).sizes for each in (model, teacher)]  # noqa: B023
        for size in ("inputs", "classes"):
            if found[0][size] != found[1][size]:
                raise UserError(
                    f"The teacher's {size} are {found[1][size]}, the student's {found[0][size]}: "
                    "choose a teacher of the same data."
                )
        return
    student, other = model.config.vocabulary, teacher.config.vocabulary
    if student != other:
        raise UserError(
            f"The teacher's vocabulary has {other} tokens, the student's {student}: distillation "
            "compares their logits token by token, so choose a teacher with the same tokenizer."
        )


def learned(config: DictConfig) -> str:
    """The parameters that are trained: what the run says, or else its parametrization."""
    if config.trainable is not None:
        return str(config.trainable)
    said = [getattr(each, "learned", None) for each in _parametrizations(config)]
    return next((pattern for pattern in said if pattern is not None), ".*")


def _set_remat(config: DictConfig, module: Any) -> None:
    if config.remat:
        module.remat = True


def _parametrizations(config: DictConfig) -> list[Parametrization]:
    return [build(config, group) for group in ("parametrization", "precision") if config[group]]


def _parametrize(config: DictConfig, module: nnx.Module, key: Any) -> None:
    """Raises UserError where a layer is refused."""
    for each in _parametrizations(config):
        try:
            each.apply(module, key)
        except ValueError as error:
            raise UserError(f"parametrization: {error}") from error


def _prepare(objective: Objective, module: nnx.Module, teacher: nnx.Module, key: Any) -> None:
    """Raises UserError where the objective cannot compare the two."""
    if not hasattr(objective, "prepare"):
        return
    try:
        objective.prepare(module, teacher, key)
    except ValueError as error:
        raise UserError(f"loss: {error}") from error


def _abstract(config: DictConfig, model: Any, objective: Objective, teacher: Any) -> nnx.Module:
    """The module that is trained, without memory."""
    made = nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0))) if callable(model) else outline(model)

    def parametrized(module: nnx.Module) -> nnx.Module:
        _set_remat(config, module)
        _parametrize(config, module, jax.random.key(0))
        if isinstance(teacher, Source):
            _prepare(objective, module, _taught(teacher), jax.random.key(0))
        return module

    return nnx.eval_shape(parametrized, made)


def _estimate(
    plain: dict[str, Any], shapes: Parts, examples: Examples, objective: Objective,
    optimizer: optax.GradientTransformation, pace: Pace, teacher: Any,
) -> Estimate:  # fmt: skip
    state = jax.eval_shape(
        lambda parts: training.init(parts, optimizer, jax.random.key(0)),
        shapes._replace(graph=None),
    )
    graph = others = None
    batch = _batch(examples, plain["batch"])
    if teacher is not None:
        graph, others = nnx.split(_taught(teacher))
    if graph is not None and (codec := getattr(objective, "codec", None)):
        batch = batch._replace(taught=_stored(codec, teacher, batch))
        graph = others = None
    step = functools.partial(
        training.take_step, graph=shapes.graph, teacher_graph=graph, objective=objective,
        optimizer=optimizer, accumulate=plain["accumulate"], dtype=plain["dtype"],
    )  # fmt: skip
    found = work(step, state, shapes.fixed, others, batch)
    machine = hardware.Hardware(**plain["hardware"])
    parameters = sum(x.size for x in jax.tree.leaves((shapes.params, shapes.fixed)))
    held = size(state) + size(shapes.fixed) + size(others) + _bytes(examples)
    seconds = OVERHEAD * pace.steps * found.operations / machine.assumed_rate()
    return Estimate(
        parameters=parameters,
        operations={"train": pace.steps * found.operations},
        memory={"train": hardware.process_memory() + held + found.temporaries},
        seconds={"start": STARTING, "train": seconds},
        disk=pace.keep * size(state) + size(shapes.params) + size(shapes.fixed),
    )


def _taught(teacher: Any) -> nnx.Module:
    """The teacher, without memory."""
    if isinstance(teacher, Source):
        return outline(teacher)
    return nnx.eval_shape(lambda: teacher(rngs=nnx.Rngs(0)))


def _stored(codec: LogitCodec, teacher: Any, batch: Batch) -> Any:
    """What the codec makes of the teacher's logits on a batch, without memory."""
    logits = jax.ShapeDtypeStruct((*batch.targets.shape, teacher.config.vocabulary), "float32")
    key = (jax.random.key(0),) if codec.seeded else ()
    return jax.eval_shape(codec.encode, logits, *key)


def _batch(examples: Examples, batch: int) -> Batch:
    return Batch(
        *(
            None if x is None else jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
            for x in examples.train
        )
    )


def _bytes(examples: Examples) -> int:
    arrays = [x for part in (examples.train, examples.heldout) for x in part if x is not None]
    return sum(np.asarray(x).nbytes for x in arrays)
