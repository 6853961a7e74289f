"""The model that is put together of alternatives to its blocks, a tensor at a time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.checkpoints.cut import SmallerSource, parameters_of
from experiments.checkpoints.planish import Part
from experiments.checkpoints.sources import Rows, Source
from experiments.errors import UserError
from experiments.structures.alternatives import PARTS, Alternative
from experiments.untrusted import DAMAGE
from models.config import BlockSizes, DecoderConfig

FILE = "blocks.{}.safetensors"  # of one block, in a library

type Tensors = Mapping[str, np.ndarray]  # by name within a block


class Assembled(SmallerSource):
    """The model of `source` with alternatives in the place of some parts of its blocks."""

    def __init__(
        self,
        source: Source,
        config: DecoderConfig,
        replaced: Mapping[int, Mapping[str, str]],
        tensors: Callable[[int], Callable[[str], Any]],
        said: Mapping[str, Any] | None = None,
    ):
        """replaced: of each block's parts that are not the parent's, the alternatives' names.
        tensors: a block's tensors, by alternative and name within the block. said: for the record.
        """
        self.source, self.config = source, config
        self.location, self.views = source.location, False
        self._replaced, self._tensors, self._said = replaced, tensors, said or {}

    def read(self, name: str) -> np.ndarray:
        if name.startswith("blocks."):
            layer, path = name.split(".", 2)[1:]
            for part, alternative in self._replaced.get(int(layer), {}).items():
                if path.split(".")[0] in PARTS[part]:
                    return np.asarray(self._tensors(int(layer))(f"{alternative}.{path}"))
        return np.asarray(self.source.read(name))

    def rows(self, name: str, rows: Rows) -> Any:
        return self.source.rows(name, rows)

    def removed(self) -> dict[str, Any]:
        before, blocks = self.source.config, self.config.blocks or ()
        gone = {
            f"blocks.{n}": _smaller(before, sizes)
            for n, sizes in enumerate(blocks)
            if sizes != BlockSizes(kv_heads=before.kv_heads, feed_forward=before.feed_forward)
        }
        return {
            "parameters": [parameters_of(before), parameters_of(self.config)],
            "layers": [before.layers, before.layers],
            "removed": gone,
            "scores": dict(self._said),
        }


def _smaller(before: DecoderConfig, sizes: BlockSizes) -> dict[str, str]:
    pairs = {"kv_heads": (sizes.kv_heads, before.kv_heads),
             "feed_forward": (sizes.feed_forward, before.feed_forward)}  # fmt: skip
    return {name: f"{before - after} of {before}" for name, (after, before) in pairs.items()
            if after != before}  # fmt: skip


def assembled(source: Source, layer: int, alternative: Alternative, tensors: Tensors) -> Assembled:
    """The model with one alternative in one block, from memory."""
    config = source.config
    parent = BlockSizes(kv_heads=config.kv_heads, feed_forward=config.feed_forward)
    sizes = [parent] * config.layers
    sizes[layer] = alternative.sizes(config)
    named = {f"{alternative.name}.{name}": x for name, x in tensors.items()}
    return Assembled(
        source, dataclasses.replace(config, blocks=tuple(sizes)),
        {layer: {alternative.part: alternative.name}}, lambda _: named.__getitem__,
    )  # fmt: skip


def stored(folder: Path) -> Callable[[int], Callable[[str], Any]]:
    """A block's tensors out of a library on disk; the last block's file is kept open."""

    @functools.lru_cache(maxsize=1)
    def of_block(layer: int) -> Callable[[str], Any]:
        path = folder / FILE.format(layer)
        try:
            return Part(path).tensor
        except (UserError, *DAMAGE) as error:
            raise UserError(
                f"{path} cannot be read: remove the library's folder, {folder.parent}, and it is "
                "made anew."
            ) from error

    return of_block
