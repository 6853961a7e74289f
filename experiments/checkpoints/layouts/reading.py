"""Quantized layers of a Hugging Face folder, by the layout that its config.json names."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from algorithms.tensors import CompressedTensor
from experiments.checkpoints.layouts.base import Layout, Scheme
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors
from experiments.checkpoints.shards import Entry
from experiments.errors import UserError

LAYOUTS: dict[str, Callable[[], Layout]] = {CompressedTensors.method: CompressedTensors}


class QuantizedLayers:
    """The layers of a folder that are stored quantized, by our names of their weights."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        entries: Mapping[str, Entry],
        shapes: Mapping[str, tuple[int, ...]],
        stored_name: Callable[[str], str],
        folder: Path,
    ):
        """raw: the config.json; entries: what the files hold; shapes: of our tensors, by name.

        Raises UserError for a description that is not read. A model that is not quantized has none.
        """
        self._entries, self._folder, self._shapes = entries, folder, shapes
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        self._modules = {name: stored_name(name).removesuffix(".weight") for name in matrices}
        self.schemes: dict[str, Scheme] = {}
        description = raw.get("quantization_config")
        if description is None:
            return
        self._layout = LAYOUTS[description["quant_method"]]()
        try:
            schemes = self._layout.parse(description, list(self._modules.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / 'config.json'} has a quantization_config that planish does not read: "
                f"{error}."
            ) from error
        found = {name: schemes[module] for name, module in self._modules.items()}
        self.schemes = {name: scheme for name, scheme in found.items() if scheme is not None}
        self.tensor = functools.lru_cache(maxsize=1)(self._tensor)

    def __contains__(self, name: str) -> bool:
        return name in self.schemes

    def _tensor(self, name: str) -> CompressedTensor:
        """A layer's weight as it is stored; raises UserError for one that does not fit."""
        module, shape = self._modules[name], self._shapes[name]
        try:
            made = self._layout.decode(self.arrays(name), self.schemes[name])
            if made.shape != shape:
                raise ValueError(f"it has shape {made.shape} where config.json says {shape}")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{module} in {self._folder} is not what {self._layout.method} stores ({error}): "
                "fetch the model again."
            ) from error
        return made

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What the files hold of a layer, by names within it; its bias is no part of that."""
        prefix = f"{self._modules[name]}."
        return {
            stored.removeprefix(prefix): entry.open()
            for stored, entry in self._entries.items()
            if stored.startswith(prefix) and stored != f"{prefix}bias"
        }


def readable(method: Any) -> bool:
    """Whether a quantization_config is of a layout that is read."""
    return isinstance(method, Mapping) and method.get("quant_method") in LAYOUTS
