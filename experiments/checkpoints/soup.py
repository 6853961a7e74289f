"""The mean of several models of one shape, as a source like others: read tensor by tensor."""

import hashlib
from collections.abc import Sequence

import numpy as np

from algorithms.optimizers.model_soups import uniform_soup
from experiments.checkpoints.sources import Source
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError


class Soup(Source):
    """A uniform soup: what members store quantized is dequantized before.

    Raises UserError for no members, or those of different shapes or tensors.
    """

    def __init__(self, members: Sequence[Source]):
        if not members:
            raise UserError("A soup needs members, and there is none: name at least one.")
        first, *others = members
        for other in others:
            if other.config != first.config or other.names() != first.names():
                raise UserError(
                    f"{other.location} is of another shape than {first.location}: a soup is of "
                    "models that began as one, so choose members of one architecture."
                )
        self.config, self._members = first.config, tuple(members)
        self.location = f"soup-of-{len(members)}"

    def names(self) -> frozenset[str]:
        return self._members[0].names()

    def read(self, name: str) -> np.ndarray:
        return np.asarray(uniform_soup([member.read(name) for member in self._members]))

    def tokenizer(self) -> Tokenizer:
        return self._members[0].tokenizer()

    def digest(self) -> str:
        said = "".join(member.digest() for member in self._members)
        return hashlib.sha256(said.encode()).hexdigest()
