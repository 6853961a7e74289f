"""What an allocation decides on by itself: layers, the readers of a site, whole blocks."""

import re
from collections.abc import Callable
from typing import NamedTuple

from models.config import DecoderConfig
from models.decoder import sites

type Kind = str  # layer, site or block


class Unit(NamedTuple):
    """Layers of a block that share what is decided."""

    layer: int
    name: str  # within the block; none: all of it
    paths: tuple[str, ...]  # within the block

    @property
    def full(self) -> str:
        return f"blocks.{self.layer}{self.name and f'.{self.name}'}"

    @property
    def match(self) -> str:
        """The pattern of a rule for these layers and no others."""
        inside = "|".join(map(re.escape, self.paths))
        return rf"blocks\.{self.layer}\.({inside})"


def units(
    config: DecoderConfig, layer: int, kind: Kind, taken: Callable[[str], bool]
) -> list[Unit]:
    """A block's units, without the layers that are `taken`, by full path."""

    def free(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path for path in paths if not taken(f"blocks.{layer}.{path}"))

    wiring = sites(config, layer)
    readers = tuple(path for site in wiring for path in site.readers)
    named: dict[Kind, list[tuple[str, tuple[str, ...]]]] = {
        "layer": [(path, (path,)) for path in readers],
        "site": [(site.name, site.readers) for site in wiring],
        "block": [("", readers)],
    }
    return [Unit(layer, name, left) for name, paths in named[kind] if (left := free(paths))]
