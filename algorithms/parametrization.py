"""Layers whose weight is made of what is learned: adapters, weights on a grid, low precision.

A parametrization puts its own layer in the place of a linear one. Such a layer computes, forward,
with the very weight that `finished` gives, so that what is evaluated during training is what is
saved; of low precision, where products are rounded too, but for that rounding. Its `nnx.Param`s are
learned, its `training.Buffer`s are statistics, and what it keeps of the old layer without learning
it is a plain `nnx.Variable`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from algorithms import surgery
from algorithms.modules import CompressedExperts, CompressedLinear
from algorithms.tensors import CompressedTensor, DenseTensor


@runtime_checkable
class LearnedLayer(Protocol):
    """What a parametrization makes of a linear layer."""

    bias: Any  # nnx.Param, or None

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]: ...

    def finished(self) -> CompressedTensor | Float[Array, "o i"]:
        """The weight that the layer computes with, as it is stored."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametrization:
    """What conf/parametrization and conf/precision name: which layers become what.

    make: the new layer, of the old one (`nnx.Linear` or `CompressedLinear`, experts among them;
    what it does not take it refuses with a ValueError) and a random key. match: the regular
    expression that a layer's whole path matches. learned: the same of the parameters that are
    trained; None: all of the model's. around: what goes around the optimizer, of layers that need
    more than the loss's gradient.
    """

    make: Callable[[Any, Key[Array, ""]], nnx.Module]
    match: str = r"blocks\..*"
    learned: str | None = None
    around: Callable[[optax.GradientTransformation], optax.GradientTransformation] | None = None

    def apply(self, model: nnx.Module, key: Key[Array, ""]) -> list[str]:
        """Replace the layers in place; their paths. Raises ValueError if there is none."""
        paths = [path for path in linear_layers(model) if re.fullmatch(self.match, path)]
        if not paths:
            raise ValueError(f"match={self.match!r} matches no linear layer of the model.")
        for path, own in zip(paths, jax.random.split(key, len(paths)), strict=True):
            surgery.replace(model, path, self.make(surgery.find(model, path), own))
        return paths


def require_dense(layer: Any, name: str) -> nnx.Linear:
    """The layer, if it is an `nnx.Linear`; else a ValueError in the name of what asks."""
    if not isinstance(layer, nnx.Linear):
        raise ValueError(
            f"{name} takes dense linear layers, not {type(layer).__name__}: choose a match without "
            "layers of experts, compressed ones and ones that learn already."
        )
    return layer


def linear_layers(model: nnx.Module) -> list[str]:
    """The paths of all linear layers, dense and compressed, in order of their names; those that
    are learned already are none.
    """
    kinds = (surgery.LinearLayer, CompressedLinear, CompressedExperts)
    return _paths(
        model, lambda module: isinstance(module, kinds) and not hasattr(module, "finished")
    )


def parts_of(layer: Any) -> tuple[CompressedTensor, Any]:
    """Weight and bias of a linear layer; a dense weight is a tensor too.

    Raises ValueError for experts.
    """
    bias = getattr(layer, "bias", None)
    if isinstance(layer, CompressedLinear):
        return layer.tensor, bias
    if isinstance(layer, nnx.Linear):
        return DenseTensor(surgery.get_weight(layer)), bias
    raise ValueError(
        f"This parametrization has no form for experts, whose layers are {type(layer).__name__}: "
        r"choose a match that leaves them out, such as 'blocks\..*attention\..*'."
    )


def finish(model: nnx.Module) -> list[str]:
    """Put in the place of every learned layer the one it stands for; their paths."""
    paths = _paths(model, lambda module: hasattr(module, "finished"))
    for path in paths:
        layer: Any = surgery.find(model, path)
        bias = None if layer.bias is None else layer.bias[...]
        weight = layer.finished()
        compressed = isinstance(weight, CompressedTensor)
        made = CompressedLinear(weight, bias) if compressed else surgery.linear(weight, bias)
        surgery.replace(model, path, made)
    return paths


def _paths(model: nnx.Module, wanted: Callable[[Any], bool]) -> list[str]:
    """Of modules, but not of those within another that is wanted."""
    found = sorted(
        (path for path, module in nnx.iter_modules(model) if wanted(module)), key=lambda p: len(p)
    )
    outer: list[tuple[Any, ...]] = []
    for path in found:
        if not any(path[: len(o)] == o for o in outer):
            outer.append(path)
    return sorted(".".join(map(str, path)) for path in outer)
