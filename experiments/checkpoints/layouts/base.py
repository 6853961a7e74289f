"""How servers' formats keep compressed layers: pure functions between tensors and named arrays.

A layout is both directions of one format. It knows a layer at a time and no files: who writes a
folder collects the schemes of all layers, and `describe` makes the configuration of them.
"""

import abc
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from algorithms.tensors import CompressedTensor

Scheme = Mapping[str, Any]  # what a format says of one layer beside its arrays; plain JSON
Arrays = Mapping[str, np.ndarray]  # of one layer, by their names within it: "qweight", "scales"


class Layout(abc.ABC):
    """One format of linear layers, written and read."""

    method: str  # `quant_method` in the quantization_config of a config.json

    @abc.abstractmethod
    def scheme(self, tensor: CompressedTensor) -> Scheme:
        """What the format says of a layer that is stored so; follows from the form alone.

        Raises ValueError, one sentence, for a tensor that the format cannot hold.
        """

    @abc.abstractmethod
    def encode(self, tensor: CompressedTensor) -> Arrays:
        """A layer's arrays, whose dense form is the tensor's bit for bit."""

    @abc.abstractmethod
    def decode(self, arrays: Arrays, scheme: Scheme) -> CompressedTensor:
        """The tensor again; raises ValueError for arrays that do not fit: a clause without its full
        stop, of which who knows the layer and the file makes a sentence.
        """

    @abc.abstractmethod
    def describe(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """The quantization_config of a model's linear layers by stored name; None: stays dense.

        Raises ValueError, one sentence, for a mixture that the format cannot say.
        """

    def cache(self, element: str) -> dict[str, Any]:
        """What the quantization_config says of keys and values beside the layers.

        Raises ValueError, one sentence, where the format cannot say it.
        """
        raise ValueError(no_cache(self.method))

    def cached(self, description: Mapping[str, Any]) -> str | None:
        """What keys and values are rounded onto; raises ValueError, a clause as in `decode`, for
        what is not read.
        """
        return None

    def dtype(self, schemes: Collection[Scheme]) -> str | None:
        """The type that a model of such layers must run in, where loaders leave no choice."""
        return None

    @abc.abstractmethod
    def parse(
        self, description: Mapping[str, Any], layers: Collection[str]
    ) -> dict[str, Scheme | None]:
        """The scheme of each of these layers, by stored name, from a quantization_config.

        Raises ValueError, a clause as in `decode`, for what is not read.
        """


def no_cache(format: str) -> str:
    """Why a format refuses a model that rounds its keys and values."""
    return (
        f"{format} has no place for the scales of keys and values: export compressed_tensors, or "
        "leave the step out (cache=none)."
    )
