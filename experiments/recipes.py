"""What is done to each layer of a model: the algorithm, what goes around it, rules.

A recipe's steps are groups of the configuration, taken in this order:

    structure    of the whole model, which is a smaller one of its architecture from then on
    rotation     of the whole model, which computes as before (QuaRot, SpinQuant)
    scaling      of each site's channels, which computes as before (SmoothQuant, AWQ)
    calibration  of what the algorithm aims at (GPTAQ); its own weights' outputs if left out
    pruning      of weights, before the algorithm, which then compresses those that are left
    algorithm    that compresses weights; none: they stay as they are
    activations  are rounded before the compressed layers
    correction   of what is lost (low rank)
    cache        of keys and values, rounded

`rules` give single layers their own: the first whose pattern matches a layer's path counts.
"""

import abc
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from algorithms.blockwise import BlockwiseMethod
from algorithms.layerwise import LayerwiseMethod, SiteTransform
from experiments.checkpoints.cut import SmallerSource
from experiments.checkpoints.sources import Source
from models.config import DecoderConfig
from models.decoder import readers

type Method = LayerwiseMethod | BlockwiseMethod
STEPS = (
    "structure", "rotation", "scaling", "calibration", "pruning", "algorithm", "activations",
    "correction", "cache",
)  # fmt: skip
ENDS = ("embed", "head")  # dense unless a rule says otherwise


class Effort(NamedTuple):
    """What finding a structure takes."""

    passes: float  # of all calibration windows through all blocks of the original
    streams: float  # of all windows' activations that are held, beside the one on its way


class Structure(abc.ABC):
    """What makes a smaller model of the same architecture; hashable."""

    @abc.abstractmethod
    def __call__(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None = None, *, chunk: int = 4
    ) -> SmallerSource:
        """The smaller model; what stays is found from windows of tokens, `chunk` at a time.

        Raises UserError where none can be made.
        """

    @abc.abstractmethod
    def effort(self, config: DecoderConfig) -> Effort:
        """config: of the original."""


class Rotation(abc.ABC):
    """A change of coordinates that leaves what the model computes as it is; hashable."""

    online: tuple[str, ...]  # layers whose input is turned as it arrives

    @property
    def descent(self) -> tuple[int, int]:
        """The steps that it is learned in, and the tokens that each takes through the model."""
        return 0, 0

    @abc.abstractmethod
    def __call__(self, source: Source, windows: Int[np.ndarray, "n T"] | None = None) -> Source:
        """The model in the new coordinates; a learned change looks at windows of tokens."""

    @abc.abstractmethod
    def wrap(self, path: str, method: LayerwiseMethod) -> LayerwiseMethod:
        """The method for a layer whose input is rotated as it arrives; path: within the block."""


@dataclasses.dataclass(frozen=True)
class Rule:
    pattern: re.Pattern[str]
    method: Method | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to each linear layer of a model."""

    default: Method | None
    rules: tuple[Rule, ...] = ()
    transform: SiteTransform | None = None
    structure: Structure | None = None
    rotation: Rotation | None = None
    calibration: Callable[[LayerwiseMethod], LayerwiseMethod] | None = None
    cache: Callable[[Source], Source] | None = None  # the model that rounds keys and values

    def method(self, path: str) -> Method | None:
        """By full path, such as "blocks.3.mlp.down"; None: the layer stays dense."""
        ruled = next((rule for rule in self.rules if rule.pattern.fullmatch(path)), None)
        if path in ENDS:
            return ruled.method if ruled else None
        method = ruled.method if ruled else self.default
        if not isinstance(method, LayerwiseMethod):
            return method
        if self.calibration is not None:
            method = _around(self.calibration, method)
        if self.rotation is not None:
            method = _rotated(self.rotation, path.split(".", 2)[2], method)
        return method

    def block(self, config: DecoderConfig, layer: int) -> dict[str, Method | None]:
        """The methods of one block's layers by path within it."""
        paths = readers(config, layer)
        return {path: self.method(f"blocks.{layer}.{path}") for path in paths}

    @property
    def learns(self) -> bool:
        """Whether any layer's method learns a whole block, from what the original gives."""
        methods = [self.default, *(rule.method for rule in self.rules)]
        return any(isinstance(method, BlockwiseMethod) for method in methods)

    @property
    def pairs(self) -> bool:
        """Whether any layer's method looks at the original model's activations too."""
        methods = [self.default, *(rule.method for rule in self.rules)]
        own = any(isinstance(method, LayerwiseMethod) and method.paired for method in methods)
        return own or self.calibration is not None

    def needs_data(self, config: DecoderConfig) -> bool:
        """Whether any layer's method looks at activations."""
        if self.transform is not None or self.cache is not None:
            return True
        found = [m for layer in range(config.layers) for m in self.block(config, layer).values()]
        return any(m is not None and looks_at_data(m) for m in found)


# One object for a layer of every block: what is compiled for a method is compiled once.
@functools.cache
def _around(
    calibration: Callable[[LayerwiseMethod], LayerwiseMethod], method: LayerwiseMethod
) -> LayerwiseMethod:
    return calibration(method)


@functools.cache
def _rotated(rotation: Rotation, path: str, method: LayerwiseMethod) -> LayerwiseMethod:
    return rotation.wrap(path, method)


def looks_at_data(method: Method) -> bool:
    return isinstance(method, BlockwiseMethod) or method.observe is not None


def steps(plain: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a record says was done, in order; plain: the resolved configuration."""
    found = [plain[step] for step in STEPS if plain.get(step)]
    return [*found, *({"rule": rule["match"], **rule} for rule in plain.get("rules") or [])]
