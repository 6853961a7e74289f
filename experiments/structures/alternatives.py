"""What may stand in the place of a block's attention or of its feed-forward layer: as many
key-value heads, or channels, as a fraction leaves; what it costs, and what it is made of.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from algorithms.pruning.structured import highest, take
from algorithms.search.puzzle import channel_contribution, pooled_heads
from algorithms.tensors import DenseTensor
from experiments.checkpoints.dimensions import axes
from experiments.checkpoints.sources import shapes
from experiments.errors import UserError
from experiments.searching import costs
from models.config import BlockSizes, DecoderConfig

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
COSTS = ("parameters", "multiplications", "cache", "seconds")
KV_HEADS = "kv_heads"
PARTS = {ATTENTION: ("attention", "attention_norm", "attention_post_norm"),
         FEED_FORWARD: ("mlp", "mlp_norm", "mlp_post_norm")}  # fmt: skip


class Alternative(NamedTuple):
    """In one block: so many units of its attention, or of its feed-forward layer."""

    part: str
    size: int  # 0: the block goes without

    @property
    def name(self) -> str:
        return f"{self.part}-{self.size}"

    def sizes(self, config: DecoderConfig) -> BlockSizes:
        """Of a block with this alternative, and the parent's other part."""
        kv = self.size if self.part == ATTENTION else config.kv_heads
        feed_forward = self.size if self.part == FEED_FORWARD else config.feed_forward
        return BlockSizes(kv_heads=kv, feed_forward=feed_forward)


def sizes_of(
    config: DecoderConfig,
    kv_heads: Sequence[float | int],
    feed_forward: Sequence[float | int],
    multiple: int,
) -> dict[str, list[int]]:
    """The sizes to choose from, the largest first; raises UserError where a model has none of them.

    multiple: of which a feed-forward width is one, rounded up.
    """
    if config.blocks is not None or config.experts is not None or not config.predicts:
        raise UserError(
            "structure=puzzle chooses attention and feed-forward layers for decoders whose blocks "
            "are alike and have no mixtures of experts: start from such a model."
        )
    found = {}
    heads = [config.kv_heads * each for each in kv_heads]
    for fraction, exact in zip(kv_heads, heads, strict=True):
        if exact != round(exact) or (exact and config.kv_heads % round(exact)):
            raise UserError(
                f"structure.kv_heads: {fraction:g} of {config.kv_heads} key-value heads are no "
                "divisor of them: heads are pooled in groups of equal size."
            )
    found[ATTENTION] = sorted({round(each) for each in heads}, reverse=True)
    widths = {min(config.feed_forward, -(-round(config.feed_forward * each) // multiple) * multiple)
              for each in feed_forward}  # fmt: skip
    found[FEED_FORWARD] = sorted(widths, reverse=True)
    return found


def whole(config: DecoderConfig) -> dict[str, int]:
    """What the parent has in every block."""
    return {ATTENTION: config.kv_heads, FEED_FORWARD: config.feed_forward}


def within(config: DecoderConfig, alternative: Alternative) -> dict[str, tuple[int, ...]]:
    """Shapes of the alternative's tensors by name within a block; none where nothing is there."""
    sizes = (alternative.sizes(config),) * config.layers
    found = shapes(dataclasses.replace(config, blocks=sizes))
    names = {name.removeprefix("blocks.0."): shape for name, shape in found.items()
             if name.startswith("blocks.0.")}  # fmt: skip
    own = PARTS[alternative.part]
    return {name: shape for name, shape in names.items() if name.split(".")[0] in own}


def cost(
    config: DecoderConfig, alternative: Alternative, *, context: int, latency_tokens: int
) -> dict[str, float]:
    """By COSTS: weights; multiplications for one token that attention looks back on `context` from;
    numbers that it leaves in the cache; seconds of the products of `latency_tokens`, measured here.
    """
    tensors = within(config, alternative)
    matrices = [shape for shape in tensors.values() if len(shape) == 2]
    inner = config.heads * config.head_size if tensors and alternative.part == ATTENTION else 0
    kv = alternative.size if alternative.part == ATTENTION else 0
    return {
        "parameters": float(sum(map(np.prod, tensors.values()))),
        "multiplications": float(sum(map(np.prod, matrices))) + 2.0 * inner * context,
        "cache": 2.0 * kv * config.head_size,
        "seconds": float(sum(_seconds(shape, latency_tokens) for shape in matrices)),
    }


@functools.cache
def _seconds(shape: tuple[int, ...], tokens: int) -> float:
    return costs.seconds([DenseTensor(jnp.zeros(shape))], tokens, 1)


def made(
    config: DecoderConfig,
    alternative: Alternative,
    tensors: Mapping[str, np.ndarray],
    activity: Float[np.ndarray, " F"],
) -> dict[str, np.ndarray]:
    """The alternative's tensors by name within the block, before it is trained.

    tensors: the parent's of that block. activity: the mean magnitude of each channel that enters
    its last projection.
    """
    own = {name: np.asarray(tensors[name], np.float32) for name in within(config, alternative)}
    if alternative.size in (0, whole(config)[alternative.part]):
        return own
    of = {name: axes(config)[f"blocks.0.{name}"] for name in own}
    if alternative.part == ATTENTION:
        return {name: _pooled(config, alternative.size, x) if of[name][0] == KV_HEADS else x
                for name, x in own.items()}  # fmt: skip
    w = jnp.asarray(tensors["mlp.down.weight"], jnp.float32)
    kept = highest(np.asarray(channel_contribution(jnp.asarray(activity), w)), alternative.size)
    return {
        name: take(x, of[name].index(FEED_FORWARD), kept, config.feed_forward)
        if FEED_FORWARD in of[name] else x
        for name, x in own.items()
    }  # fmt: skip


def _pooled(config: DecoderConfig, fewer: int, x: np.ndarray) -> np.ndarray:
    return np.asarray(pooled_heads(jnp.asarray(x), config.kv_heads, fewer))
