"""The module that is trained, and the one that teaches it: from a configuration to both, loaded or
in outline, without memory.
"""

from typing import Any

import jax
from flax import nnx
from omegaconf import DictConfig

from algorithms.parametrization import Parametrization
from algorithms.training import Objective
from experiments.checkpoints.loading import load_model, outline
from experiments.checkpoints.sources import Source
from experiments.entry import build
from experiments.errors import UserError

type Origin = Any  # a source, or what makes a module of random keys


def opened(config: DictConfig, key: str) -> Origin:
    """What `model` or `teacher` names, opened; raises UserError for what gives no weights."""
    found = build(config, key)
    if not isinstance(found, Source) and not callable(found):
        raise UserError(f"{key}: an endpoint gives no weights: choose a model on this machine.")
    return found


def loaded(origin: Origin, seed: int = 0) -> Any:
    """The module; seed: of weights that are made rather than read."""
    return load_model(origin) if isinstance(origin, Source) else origin(rngs=nnx.Rngs(seed))


def outlined(origin: Origin) -> Any:
    """The module without memory."""
    if isinstance(origin, Source):
        return outline(origin)
    return nnx.eval_shape(lambda: origin(rngs=nnx.Rngs(0)))


def prepared(config: DictConfig, module: Any, objective: Objective, teacher: Any, key: Any) -> None:
    """Give the module what is learned in place of its weights, or beside them.

    Raises UserError where a layer is refused, or the objective cannot compare the two.
    """
    if config.remat:
        module.remat = True
    for each in parametrizations(config):
        try:
            each.apply(module, key)
        except ValueError as error:
            raise UserError(f"parametrization: {error}") from error
    if teacher is not None and hasattr(objective, "prepare"):
        try:
            objective.prepare(module, teacher, key)
        except ValueError as error:
            raise UserError(f"loss: {error}") from error


def abstract(config: DictConfig, model: Origin, objective: Objective, teacher: Origin) -> Any:
    """The module that is trained, without memory."""

    def whole(module: Any) -> Any:
        taught = None if teacher is None else outlined(teacher)
        prepared(config, module, objective, taught, jax.random.key(0))
        return module

    return nnx.eval_shape(whole, outlined(model))


def parametrizations(config: DictConfig) -> list[Parametrization]:
    return [build(config, group) for group in ("parametrization", "precision") if config[group]]


def learned(config: DictConfig) -> str:
    """The parameters that are trained: what the run says, or else its parametrization."""
    if config.trainable is not None:
        return str(config.trainable)
    said = [each.learned for each in parametrizations(config)]
    return next((pattern for pattern in said if pattern is not None), ".*")


def require_alike(model: Origin, teacher: Origin) -> None:
    """Refuse a teacher that speaks of other tokens, or of other classes."""
    if isinstance(teacher, Source) != isinstance(model, Source):
        raise UserError("teacher: a language model teaches a language model: choose both so.")
    if not isinstance(model, Source):
        found = [outlined(each).sizes for each in (model, teacher)]
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
