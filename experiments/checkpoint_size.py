"""What a compressed model takes to store, from shapes: by kind of block, and on disk."""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from experiments import programs
from experiments.checkpoints.sources import shapes
from experiments.operations import size
from experiments.recipes import ENDS, Recipe
from experiments.streaming import Walk
from models.config import DecoderConfig

NOTE = 580  # bytes in a checkpoint that describe one tensor, beside its numbers
TOKEN = 32  # bytes in a checkpoint for one entry of the tokenizer's vocabulary


class Kind(NamedTuple):
    """Blocks that are alike: the first of them, and the methods of its layers by path."""

    layer: int
    methods: tuple[tuple[str, Any], ...]


def kinds_of(config: DecoderConfig, recipe: Recipe) -> dict[Kind, int]:
    """The different blocks that a recipe makes, and how many of each."""
    return Counter(each_kind(config, recipe))


def each_kind(config: DecoderConfig, recipe: Recipe) -> list[Kind]:
    """What a recipe makes of each block."""
    first: dict[Any, int] = {}
    found = []
    for layer in range(config.layers):
        methods = tuple(recipe.block(config, layer).items())
        found.append(Kind(first.setdefault((config.kind(layer), methods), layer), methods))
    return found


@functools.cache
def tensors_of(config: DecoderConfig, kind: Kind) -> dict[str, Any]:
    return programs.compressed_shapes(config, kind.layer, dict(kind.methods))


def checkpoint_bytes(
    config: DecoderConfig, recipe: Recipe, kinds: Mapping[Kind, int], walk: Walk
) -> int:
    """On disk: every tensor, what describes it, the tokenizer."""
    # As the source has it may be wider than it is: float32 is the widest that a source gives.
    width = jnp.dtype(walk.dense_dtype or "float32").itemsize
    everything = shapes(config)
    total = sum(_end_bytes(recipe, n, s, width) for n, s in everything.items()
                if not n.startswith("blocks."))  # fmt: skip
    for kind, count in kinds.items():
        tensors = tensors_of(config, kind)
        block = f"blocks.{kind.layer}."
        inside = {n: s for n, s in everything.items() if n.startswith(block)}
        dense = [s for n, s in inside.items() if _path(n) not in tensors]
        packed = sum(size(tensor) for tensor in tensors.values())
        total += count * (packed + width * sum(map(math.prod, dense)))
    return total + NOTE * len(everything) + TOKEN * config.vocabulary


def _end_bytes(recipe: Recipe, name: str, shape: tuple[int, ...], width: int) -> int:
    """Of a tensor outside the blocks, which only a rule compresses."""
    path = name.removesuffix(".weight")
    method = recipe.method(path) if path in ENDS else None
    if method is None:
        return width * math.prod(shape)
    return size(programs.end_shape(shape, method))


def _path(name: str) -> str:
    """A tensor's module path within its block: "blocks.3.mlp.up.weight" is of "mlp.up"."""
    return name.split(".", 2)[-1].removesuffix(".weight")
