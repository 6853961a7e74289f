"""A source whose model is a smaller one of the same architecture: blocks and channels are left out.
What else makes a smaller model than a source has, is a `SmallerSource` too.

What stays is found when the first tensor is read; the shape is known before. Tensors are cut as
they are read, so that the original need not fit in memory.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from algorithms.pruning.structured import norm_over_fewer, spans, take
from algorithms.tensors import CompressedTensor
from experiments.checkpoints.dimensions import axes, sizes
from experiments.checkpoints.sources import Rows, Source, shapes
from experiments.data.tokenizer import Tokenizer
from models.config import DecoderConfig

type Units = Mapping[str, Int[np.ndarray, " _"]]  # by dimension


class Kept(NamedTuple):
    """What stays of a model, by the numbers that it has there."""

    layers: tuple[int, ...]
    everywhere: Units = {}  # of dimensions that all blocks share
    within: Mapping[int, Units] = {}  # of each block's own
    scores: Mapping[str, Any] = {}  # for the record: what was chosen by, or joined
    merged: Mapping[int, Float[np.ndarray, "_ _"]] = {}  # of mixtures: experts of before, averaged


class SmallerSource(Source):
    """A model of the shape `config` that is made of the one of `source`."""

    source: Source

    def names(self) -> frozenset[str]:
        return frozenset(shapes(self.config))

    def digest(self) -> str:
        return self.source.digest()

    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    @abc.abstractmethod
    def removed(self) -> dict[str, Any]:
        """What a record says: how much is left of what (pairs), what went, and by what it was
        chosen ("scores").
        """


class CutSource(SmallerSource):
    """What `find` keeps of the model of `source`, which makes a model of the shape `config`."""

    def __init__(
        self,
        source: Source,
        config: DecoderConfig,
        find: Callable[[], Kept],
        original: DecoderConfig | None = None,
    ):
        """find: called when the first tensor is read. original: what a record compares with, if not
        the model of `source`.
        """
        self.source, self.config, self._find = source, config, find
        self.location = source.location
        self.original = original or source.config

    @functools.cached_property
    def kept(self) -> Kept:
        found = self._find()
        assert len(found.layers) == self.config.layers
        return found

    def read(self, name: str) -> np.ndarray:
        return self._cut(name, np.asarray(self.source.read(self._origin(name))))

    def rows(self, name: str, rows: Rows) -> Any:
        """Of the embedding or the head, which keep all of theirs."""
        found = self.source.rows(self._origin(name), rows)
        if isinstance(found, CompressedTensor):
            found = found.dequantize()
        return self._cut(name, np.asarray(found))

    def removed(self) -> dict[str, Any]:
        """With which units went, by block."""
        before, after = self.source.config, self.config
        counts = {d: [n, sizes(after)[d]] for d, n in sizes(before).items()}
        layers = [n for n in range(before.layers) if n not in self.kept.layers]
        blocks = {f"blocks.{n}": _gone(units, before) for n, units in self.kept.within.items()}
        return {
            "parameters": [parameters_of(self.original), parameters_of(after)],
            "layers": [before.layers, after.layers],
            **{d: pair for d, pair in counts.items() if pair[0] != pair[1]},
            "removed": {
                **({"layers": spans(layers)} if layers else {}),
                **_gone(self.kept.everywhere, before),
                **{block: gone for block, gone in blocks.items() if gone},
            },
            **self.kept.scores,
        }

    def _origin(self, name: str) -> str:
        """The name of the tensor that this one is cut from."""
        root, _, rest = name.partition(".")
        if root != "blocks":
            return name
        layer, _, within = rest.partition(".")
        return f"blocks.{self.kept.layers[int(layer)]}.{within}"

    def _cut(self, name: str, x: np.ndarray) -> np.ndarray:
        origin, before = self._origin(name), sizes(self.source.config)
        root, _, rest = origin.partition(".")
        layer = int(rest.split(".")[0]) if root == "blocks" else None
        units = {**self.kept.everywhere, **self.kept.within.get(layer, {})}  # type: ignore[arg-type]
        merging = self.kept.merged.get(layer)  # type: ignore[arg-type]
        for axis, dimension in enumerate(axes(self.source.config)[origin]):
            if dimension == "experts" and merging is not None:
                averaged = np.tensordot(merging, x, (1, axis))
                x = np.moveaxis(averaged, 0, axis).astype(x.dtype)
            if dimension in units:
                channels = x.shape[axis]
                x = take(x, axis, units[dimension], before[dimension])
                if origin.endswith("norm.weight"):
                    x = norm_over_fewer(x, channels, x.shape[axis])
        return x


def _gone(units: Units, config: DecoderConfig) -> dict[str, str]:
    every = {d: np.setdiff1d(np.arange(sizes(config)[d]), kept) for d, kept in units.items()}
    return {dimension: spans(gone.tolist()) for dimension, gone in every.items() if gone.size}


def parameters_of(config: DecoderConfig) -> int:
    return sum(map(math.prod, shapes(config).values()))


def of_layers(config: DecoderConfig, layers: tuple[int, ...]) -> DecoderConfig:
    """The shape of a model of some of these blocks, each with the settings that it has here."""
    mixing = config.experts
    if mixing is not None and mixing.layers is not None:
        mixed = _renumbered(mixing.layers, layers)
        mixing = dataclasses.replace(mixing, layers=mixed) if mixed else None
    windows = config.windows
    return dataclasses.replace(
        config,
        layers=len(layers),
        windows=None if windows is None else tuple(windows[n] for n in layers),
        blocks=None if config.blocks is None else tuple(config.blocks[n] for n in layers),
        unrotated=_renumbered(config.unrotated, layers),
        experts=mixing,
    )


def _renumbered(some: tuple[int, ...], layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(new for new, old in enumerate(layers) if old in some)


def layers_differ(config: DecoderConfig) -> bool:
    """Whether which blocks stay decides what the model is, and not only how many."""
    return len({(config.layer(n), config.mixes(n)) for n in range(config.layers)}) > 1


def of_sizes(config: DecoderConfig, changed: Mapping[str, int]) -> DecoderConfig:
    """The shape of a model with fewer units of some dimensions. Fewer hidden channels take a larger
    constant in its norms, whose mean is over fewer; norms of q and k, if any, share it.
    """
    plain: dict[str, Any] = {d: n for d, n in changed.items() if d != "experts"}
    if "hidden" in changed:
        plain["norm_epsilon"] = config.norm_epsilon * config.hidden / changed["hidden"]
    if "experts" in changed:
        assert config.experts is not None
        plain["experts"] = dataclasses.replace(config.experts, count=changed["experts"])
    return dataclasses.replace(config, **plain)
