"""A source whose keys and values are rounded before attention sees them: what conf/cache names."""

import dataclasses

import numpy as np

from algorithms.kv_cache import SCALES
from experiments.checkpoints.sources import Source, shapes
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from models.config import CacheElement


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedCache:
    """Makes a model keep keys and values as 8-bit `element`s; the walk fits their scales."""

    element: CacheElement

    def __call__(self, source: Source) -> Source:
        if not source.config.causal:
            raise UserError(
                "cache is for models that predict tokens, and this is an encoder, which keeps no "
                "keys and values: leave it out (cache=none)."
            )
        return CachedSource(source, self.element)


class CachedSource(Source):
    """The model of `source` with scales that are yet to be fitted: 0 rounds nothing."""

    def __init__(self, source: Source, element: CacheElement):
        self._source, self.location, self.stored_as = source, source.location, source.stored_as
        self.views = source.views
        self.config = dataclasses.replace(source.config, cache=element)

    def names(self) -> frozenset[str]:
        return frozenset(shapes(self.config))

    def read(self, name: str) -> np.ndarray:
        return np.zeros(1, np.float32) if name.endswith(SCALES) else self._source.read(name)

    def tensor(self, name: str) -> object:
        return self.read(name) if name.endswith(SCALES) else self._source.tensor(name)

    def tokenizer(self) -> Tokenizer:
        return self._source.tokenizer()

    def digest(self) -> str:
        return self._source.digest()
