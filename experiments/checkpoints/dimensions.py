"""Which axes of which tensors go together: found from the architecture, of any family.

An axis is of the dimension whose size is that axis' length, times a constant: where a model with
one more unit of the dimension has a longer axis there. So what depends on what is read off the
architectures that `models` declares, norms, biases and tables of positions included.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping

from experiments.checkpoints.sources import shapes
from models.config import DecoderConfig

DIMENSIONS = ("hidden", "heads", "kv_heads", "feed_forward", "experts")
Axes = tuple[str | None, ...]  # the dimension that each axis of a tensor is of; None: of another


@functools.cache
def axes(config: DecoderConfig) -> Mapping[str, Axes]:
    """Of every tensor of a model, by our names."""
    longer = {dimension: _with_more(config, dimension) for dimension in DIMENSIONS}
    found = {}
    for name, shape in shapes(config).items():
        found[name] = tuple(
            next((d for d, pair in longer.items() if _differ(pair, name, axis)), None)
            for axis in range(len(shape))
        )
    return types.MappingProxyType(found)


def sizes(config: DecoderConfig) -> dict[str, int]:
    """How many units of each dimension a model has."""
    experts = 0 if config.experts is None else config.experts.count
    plain = {name: getattr(config, name) for name in DIMENSIONS if name != "experts"}
    return {**plain, "experts": experts}


def _differ(pair: tuple[Mapping[str, tuple[int, ...]], ...], name: str, axis: int) -> bool:
    fewer, more = pair
    return bool(more) and more[name][axis] != fewer[name][axis]


def _with_more(
    c: DecoderConfig, dimension: str
) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]]:
    """Shapes of two models that differ in one dimension alone."""
    change = functools.partial(dataclasses.replace, c)
    if dimension == "kv_heads":  # which have to divide the query heads
        twice = {"heads": 2 * c.heads}
        return shapes(change(**twice)), shapes(change(**twice, kv_heads=2 * c.kv_heads))
    if dimension == "experts":
        if c.experts is None:
            return {}, {}
        more = dataclasses.replace(c.experts, count=c.experts.count + 1)
        return shapes(c), shapes(change(experts=more))
    step = c.heads if dimension == "heads" else 1  # twice as many: a multiple of any kv_heads
    return shapes(c), shapes(change(**{dimension: getattr(c, dimension) + step}))
