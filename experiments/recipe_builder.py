"""From a configuration to a recipe; every mistake in its rules is a sentence."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from algorithms.blockwise import BlockwiseMethod
from algorithms.layerwise import LayerwiseMethod
from algorithms.pruning.pruned import pruned
from experiments.configuration import did_you_mean
from experiments.entry import build
from experiments.errors import UserError
from experiments.recipes import ENDS, Method, Recipe, Rule, Structure, looks_at_data
from models.config import DecoderConfig
from models.decoder import readers

RULE = ("match", "pruning", "algorithm", "activations", "correction")


def build_structure(config: DictConfig) -> Structure | None:
    """What makes the model smaller, before anything else is done to it."""
    return build(config, "structure") if config.get("structure") else None


def build_recipe(
    config: DictConfig, model: DecoderConfig, structure: Structure | None = None
) -> Recipe:
    """The recipe of a configuration, for a model of this shape; raises UserError for a mistake.

    structure: that gave the model its shape.
    """
    default = _method(config, {})
    rules = tuple(_rule(config, n, rule) for n, rule in enumerate(_rules(config)))
    scaling = build(config, "scaling") if config.get("scaling") else None
    rotation = build(config, "rotation") if config.get("rotation") else None
    cache = build(config, "cache") if config.get("cache") else None
    recipe = Recipe(default, rules, scaling, structure, rotation, _calibration(config), cache)
    _require_something(config, recipe)
    _require_used(recipe, model)
    _require_data_free_ends(recipe)
    _require_one_kind(recipe, model)
    return recipe


def _calibration(config: DictConfig) -> Callable[[LayerwiseMethod], LayerwiseMethod] | None:
    """What methods aim at; one object for one configuration, as `_made` has it."""
    if not config.get("calibration"):
        return None
    if config.walk.sequential is not True:
        raise UserError(
            "calibration makes up for what earlier layers lose, and with "
            f"walk.sequential={str(config.walk.sequential).lower()} no layer sees that, or not "
            "every one: leave one of the two out."
        )
    return _made_calibration(OmegaConf.to_yaml(config.calibration, resolve=True))


@functools.cache
def _made_calibration(yaml: str) -> Callable[[LayerwiseMethod], LayerwiseMethod]:
    return build(OmegaConf.create({"calibration": OmegaConf.create(yaml)}), "calibration")


def _rules(config: DictConfig) -> Sequence[Mapping[str, Any]]:
    rules = OmegaConf.to_container(config.get("rules") or OmegaConf.create([]), resolve=True)
    assert isinstance(rules, list)
    return rules


def _rule(config: DictConfig, number: int, rule: Any) -> Rule:
    where = f"rules[{number}]"
    if not isinstance(rule, Mapping) or not isinstance(rule.get("match"), str):
        raise UserError(f"{where} should be a mapping with match: PATTERN, and is {rule!r}.")
    for key in rule:
        if key not in RULE:
            raise UserError(f"{where} has no setting {key}{did_you_mean(str(key), RULE)}")
    try:
        pattern = re.compile(rule["match"])
    except re.error as error:
        raise UserError(f"{where}: match={rule['match']!r} is no pattern: {error}.") from error
    return Rule(pattern, _method(config, rule))


def _method(config: DictConfig, rule: Mapping[str, Any]) -> Method | None:
    """The algorithm and what goes around it, a rule's settings in place of the configuration's."""
    nodes = {step: _merged(config, step, rule) for step in RULE[1:]}
    if nodes["algorithm"] is None:
        return None
    if "_target_" not in nodes["algorithm"]:
        raise UserError(
            f"rules: algorithm={nodes['algorithm']} changes settings of an algorithm, and "
            "algorithm=none has none: give it a _target_ of its own, such as "
            "algorithms.quantization.rtn.rtn."
        )
    return _instantiate(OmegaConf.create(nodes))


def _merged(config: DictConfig, step: str, rule: Mapping[str, Any]) -> Any:
    """A rule's own settings lie over the configuration's; another target replaces them."""
    base = config.get(step)
    plain = OmegaConf.to_container(base, resolve=True) if base else None
    if step not in rule:
        return plain
    mine = rule[step]
    if mine is None or "_target_" in mine or plain is None:
        return mine
    return OmegaConf.to_container(OmegaConf.merge(plain, mine))


def with_settings(config: DictConfig, step: str, settings: Mapping[str, Any]) -> DictConfig:
    """The configuration with a step's settings laid over its own, as those of a rule are."""
    found = config.copy()
    found[step] = _merged(config, step, {step: settings})
    return found


@functools.cache
def _made(yaml: str) -> Method:
    """One object for one configuration: what is compiled for a method is compiled once."""
    nodes = OmegaConf.create(yaml)
    assert isinstance(nodes, DictConfig)
    method = build(nodes, "algorithm")
    if nodes["pruning"]:
        pruner = build(nodes, "pruning")
        if not isinstance(method, LayerwiseMethod) or not isinstance(pruner, LayerwiseMethod):
            raise UserError(
                "pruning goes before an algorithm that takes one layer at a time, and both have to "
                f"be such: {nodes.pruning.get('_target_', nodes.pruning)}, "
                f"{nodes.algorithm._target_}."
            )
        method = pruned(pruner, method)
    for step in ("activations", "correction"):
        if not nodes[step]:
            continue
        if isinstance(method, BlockwiseMethod):
            raise UserError(
                f"{step} goes around methods that take one layer at a time, and "
                f"{nodes.algorithm._target_} learns a whole block: leave it out ({step}=none)."
            )
        method = build(nodes, step)(method)
    return method


def _instantiate(nodes: DictConfig) -> Method:
    return _made(OmegaConf.to_yaml(nodes))


def _require_something(config: DictConfig, recipe: Recipe) -> None:
    """A run that does nothing, or a step around an algorithm that is not there, is a mistake.

    What a training run leaves is float32: to store it as the walk does (`walk.dense_dtype`) is
    something.
    """
    if config.get("algorithm") or recipe.rules:
        return
    for step in ("calibration", "pruning", "activations", "correction"):
        if config.get(step):
            raise UserError(
                f"{step} goes around an algorithm, and there is none: choose one with "
                f"algorithm=NAME, or leave it out ({step}=none)."
            )
    trained = config.get("model", {}).get("command") == "train"
    if not (recipe.structure or recipe.rotation or recipe.transform or recipe.cache or trained):
        raise UserError(
            "algorithm=none leaves all weights as they are, and no other step does anything: "
            "choose an algorithm, or another step, such as structure=shortgpt."
        )


def _require_used(recipe: Recipe, model: DecoderConfig) -> None:
    """A rule that decides nothing is a mistake: a pattern mistyped, or hidden by one before it."""
    paths = [f"blocks.{n}.{path}" for n in range(model.layers) for path in readers(model, n)]
    paths += ["embed"] if model.tied_embeddings else [*ENDS]
    deciding = [next((n for n, r in enumerate(recipe.rules) if r.pattern.fullmatch(path)), None)
                for path in paths]  # fmt: skip
    for number, rule in enumerate(recipe.rules):
        if number not in deciding:
            last = max(path for path in paths if path.startswith("blocks.0."))
            raise UserError(
                f"rules[{number}]: match={rule.pattern.pattern!r} decides no layer: patterns match "
                f"whole paths such as {paths[0]}, {last} or embed, and the "
                "first that matches counts."
            )


def _require_data_free_ends(recipe: Recipe) -> None:
    for path in ENDS:
        method = recipe.method(path)
        if method is not None and looks_at_data(method):
            raise UserError(
                f"{path} can be compressed by a method without calibration alone: give its rule "
                "an algorithm such as {_target_: algorithms.quantization.rtn.rtn}."
            )


def _require_one_kind(recipe: Recipe, model: DecoderConfig) -> None:
    if recipe.learns and recipe.rotation is not None and recipe.rotation.online:
        raise UserError(
            "A method that learns a whole block does not turn inputs as they arrive: set "
            "rotation.online=[]."
        )
    if recipe.learns and recipe.calibration is not None:
        raise UserError(
            "calibration is for methods that take one layer at a time; one that learns a whole "
            "block aims at the original's output by itself: leave it out (calibration=none)."
        )
    for layer in range(model.layers):
        found = [m for m in recipe.block(model, layer).values() if m is not None]
        learned = [isinstance(m, BlockwiseMethod) for m in found]
        if any(learned) and not all(learned):
            raise UserError(
                f"Block {layer}: a method that learns a whole block and one that takes single "
                "layers cannot share it: give all its layers one kind, or keep them dense."
            )
