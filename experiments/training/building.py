"""The optimizer that a configuration describes: Hydra's nodes from the inside out.

    averaging(outer(sparsity(chain(clipping, optimizer))))

Every number called `learning_rate` in them is the peak of the run's schedule.
"""

from collections.abc import Mapping
from typing import Any

import hydra
import optax
from omegaconf import DictConfig, OmegaConf

from algorithms.optimizers.groups import assignment, named
from experiments.entry import build
from experiments.errors import UserError

SCALED = "algorithms.optimizers.schedules.scaled"
AROUND = ("sparsity", "outer", "averaging")  # functions of an optimizer, innermost first


def build_optimizer(config: DictConfig) -> optax.GradientTransformation:
    """Raises UserError for settings that an optimizer refuses."""
    schedule = OmegaConf.to_container(config.schedule, resolve=True)
    scheduled = OmegaConf.create(
        {
            group: _scheduled(
                OmegaConf.to_container(config[group], resolve=True), schedule, config.learning_rates
            )
            for group in ("optimizer", *AROUND)
        }
    )
    if config.clip is not None and not config.clip > 0:
        raise UserError(f"clip={config.clip} must be positive, or null.")
    if inside := config.clip is not None and _name(config.optimizer) == "sam":
        scheduled.optimizer.inner = _clipped(config.clip, scheduled.optimizer.inner)
    found = build(scheduled, "optimizer")
    if config.clip is not None and not inside:
        found = optax.chain(optax.clip_by_global_norm(config.clip), found)
    for group in AROUND:
        if scheduled[group]:
            around = hydra.utils.instantiate(scheduled[group])
            try:
                found = around(found)
            except (ValueError, TypeError) as error:
                raise UserError(f"{group}: {error}") from error
    return optax.with_extra_args_support(found)


def assigned(config: DictConfig, params: Any) -> dict[str, str]:
    """The optimizer of each parameter, for a dry run: group and name.

    Raises UserError for a parameter that belongs to no group.
    """
    node = config.optimizer
    if "match" not in node:
        return dict.fromkeys(named(params), _name(node))
    match = {str(group): str(pattern) for group, pattern in node.match.items()}
    try:
        found = assignment(params, match)
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from error
    return {name: f"{group}: {_name(node[group])}" for name, group in found.items()}


def _clipped(norm: float, node: Any) -> dict[str, Any]:
    """SAM's second gradient is what a step is taken by, and only its inner optimizer sees it."""
    clipping = {"_target_": "optax.clip_by_global_norm", "max_norm": norm}
    return {"_target_": "optax.chain", "_args_": [clipping, node]}


def _name(node: Any) -> str:
    name = str(node["_target_"]).rpartition(".")[-1]
    return " + ".join(map(_name, node["_args_"])) if name == "chain" else name


def _scheduled(node: Any, schedule: Any, factor: int | float) -> Any:
    """With a schedule in place of every learning rate."""
    if isinstance(node, Mapping):
        return {key: _entry(key, value, schedule, factor) for key, value in node.items()}
    if isinstance(node, list):
        return [_scheduled(value, schedule, factor) for value in node]
    return node


def _entry(key: Any, value: Any, schedule: Any, factor: int | float) -> Any:
    if key == "learning_rate" and isinstance(value, int | float):
        return {"_target_": SCALED, "schedule": schedule, "peak": factor * value}
    return _scheduled(value, schedule, factor)
