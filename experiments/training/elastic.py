"""Training that makes all sub-networks of a model good: what conf/elastic names, around a loss."""

from omegaconf import DictConfig

from algorithms.search.slimmable import Rule, Sandwich
from algorithms.training import Objective
from experiments.checkpoints.sources import Source
from experiments.entry import build
from experiments.errors import UserError
from experiments.structures.supernet import places_of, space_of
from experiments.training.subject import Origin, outlined


def around(config: DictConfig, model: Origin, objective: Objective) -> Objective:
    """The objective with smaller networks beside the whole one, if they are asked for.

    Raises UserError for a model without any, and for a loss that they cannot learn beside.
    """
    if not config.elastic:
        return objective
    rule: Rule = build(config, "elastic")
    if not isinstance(model, Source):
        raise UserError("elastic: a classifier's sizes are not known by name: choose a decoder.")
    if config.parametrization or config.precision:
        raise UserError(
            "elastic leaves out parts of plain weights: choose parametrization=none and "
            "precision=none."
        )
    if hasattr(objective, "prepare") or hasattr(objective, "codec"):
        raise UserError(
            "elastic: this loss learns beside the model, or from what was stored: choose one of a "
            "model's predictions, such as cross_entropy or forward_kl."
        )
    found = space_of(model.config, dict(rule.choices), "elastic")
    places = places_of(outlined(model), model.config)
    return Sandwich(objective=objective, rule=rule, space=found, places=places)
