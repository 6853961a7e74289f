"""What a training run would do and take, worked out from its configuration before it begins."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from omegaconf import DictConfig
from rich.table import Table

from algorithms import training
from algorithms.optimizers.groups import named
from algorithms.training import Objective, Parts
from experiments import hardware
from experiments.checkpoints.sources import Source, require_predictions
from experiments.data.windows import Windows
from experiments.entry import build, resolved
from experiments.errors import UserError
from experiments.estimate import Estimate
from experiments.progress import console
from experiments.training import cost, elastic, subject
from experiments.training.building import assigned, build_optimizer
from experiments.training.data import Examples, Order, next_tokens
from experiments.training.loop import Job, Pace
from experiments.training.parallel import Devices


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
        hardware.require(found, memory=memory, folder=folder)
        hardware.announce(found, folder)

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
        around = {"elastic": plain["elastic"]} if plain["elastic"] else {}
        return [{"_target_": "experiments.train", "steps": plain["steps"], "loss": plain["loss"],
                 "optimizer": plain["optimizer"], **around}]  # fmt: skip

    def job(self) -> Job:
        """Everything loaded."""
        plain = resolved(self.config)
        seed = plain["seeds"]["init"]
        module = subject.loaded(self.model, seed)
        taught = None if self.teacher is None else subject.loaded(self.teacher)
        subject.prepared(self.config, module, self.objective, taught, jax.random.key(seed))
        graph, teacher = (None, None) if taught is None else nnx.split(taught)
        parts = training.take_apart(module, subject.learned(self.config))
        return Job(
            parts, self.objective, self.optimizer, self.examples, self.order, self.pace,
            seed=plain["seeds"]["method"], accumulate=plain["accumulate"], dtype=plain["dtype"],
            teacher_graph=graph, teacher=teacher, schedule=build(self.config, "schedule"),
            mesh=self.mesh, floor=cost.floor(self.estimate, self.pace.steps),
            config=getattr(self.model, "config", None),
            teacher_config=getattr(self.teacher, "config", None),
        )  # fmt: skip


def plan(config: DictConfig) -> Plan:
    """Open what the configuration names and estimate; raises UserError for what cannot be run."""
    plain = resolved(config)
    model = subject.opened(config, "model")
    teacher = None if config.get("teacher") is None else subject.opened(config, "teacher")
    windows, examples = _data(config, plain, model)
    if teacher is not None:
        subject.require_alike(model, teacher)
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
    optimizer = _optimizer(config)
    objective = elastic.around(config, model, build(config, "loss"))
    try:
        module = subject.abstract(config, model, objective, teacher)
        shapes = training.take_apart(module, subject.learned(config))
    except ValueError as error:
        raise UserError(str(error)) from error
    assigned(config, shapes.params)
    try:
        found = cost.estimate(plain, shapes, examples, objective, optimizer, pace, teacher)
    except ValueError as error:  # of the objective: shapes alone went through it
        raise UserError(f"loss: {str(error).splitlines()[0]}") from error
    return Plan(
        config, model, teacher, examples, windows, objective, optimizer, order, pace,
        build(config, "evaluation"), found, shapes, mesh,
    )  # fmt: skip


def _optimizer(config: DictConfig) -> optax.GradientTransformation:
    """With what the parametrizations put around it."""
    found = build_optimizer(config)
    for each in subject.parametrizations(config):
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
