"""Quantized layers of a Hugging Face folder, by the layout that its config.json names."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from algorithms.tensors import CompressedTensor, ExpertsTensor
from experiments.checkpoints.families.base import Place
from experiments.checkpoints.layouts.awq import AWQ
from experiments.checkpoints.layouts.base import Layout, Scheme
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors
from experiments.checkpoints.layouts.gptq import GPTQ
from experiments.checkpoints.shards import TYPES, Entry
from experiments.errors import UserError
from experiments.untrusted import DAMAGE, explained

LAYOUTS: dict[str, Callable[[], Layout]] = {
    layout.method: layout for layout in (CompressedTensors, GPTQ, AWQ)
}


class QuantizedLayers:
    """The layers of a folder that are stored quantized, by our names of their weights."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        entries: Mapping[str, Entry],
        places: Mapping[str, Sequence[Place]],
        folder: Path,
    ):
        """raw: the config.json; entries: what the files hold; places: of our tensors, by name.

        Raises UserError for a description that is not read. A model that is not quantized has none.
        """
        self._entries, self._folder, self._places = entries, folder, places
        self.schemes: dict[str, Scheme] = {}  # by module
        description = raw.get("quantization_config")
        self.method = None if description is None else str(description["quant_method"])
        if description is None:
            return
        self._stored: dict[str, dict[str, Entry]] = collections.defaultdict(dict)
        for name, entry in entries.items():
            module, _, field = name.rpartition(".")
            self._stored[module][field] = entry
        self._layout = LAYOUTS[description["quant_method"]]()
        matrices = [place for found in places.values() for place in found if len(place.shape) == 2]
        modules = dict.fromkeys(_module(place) for place in matrices)
        try:
            schemes = self._layout.parse(description, list(modules))
        except DAMAGE as error:
            raise UserError(
                f"{folder / 'config.json'} has a quantization_config that planish does not read: "
                f"{explained(error)}."
            ) from error
        self.schemes = {
            module: s for module, s in schemes.items() if s is not None and not self._dense(module)
        }
        self._decoded = functools.lru_cache(maxsize=1)(self._decode)
        self.tensor = functools.lru_cache(maxsize=1)(self._tensor)

    def _dense(self, module: str) -> bool:
        """Whether a module has an ordinary weight, whatever the description says of all."""
        entry = self._entries.get(f"{module}.weight")
        return entry is not None and entry.storage in TYPES

    def __contains__(self, name: str) -> bool:
        return len(self._places[name][0].shape) == 2 and any(
            _module(place) in self.schemes for place in self._places[name]
        )

    def _tensor(self, name: str) -> CompressedTensor:
        """A layer's weight as it is stored; raises UserError for one that does not fit."""
        pieces = [self._piece(place) for place in self._places[name]]
        if len(pieces) == 1:
            return pieces[0]
        forms = {jax.tree.structure(piece) for piece in pieces}
        if len(forms) > 1:
            raise UserError(
                f"{name} in {self._folder} is quantized in different ways for different experts, "
                "which planish does not read: quantize all experts of a layer alike."
            )
        return ExpertsTensor(jax.tree.map(lambda *leaves: jnp.stack(leaves), *pieces))

    def _piece(self, place: Place) -> CompressedTensor:
        """One of the layers that a matrix holds."""
        start, stop = place.rows
        whole = self._decoded(_module(place), place.shape)
        lengths = {"before": start, "it": stop - start, "after": place.shape[0] - stop}
        lengths = {part: rows for part, rows in lengths.items() if rows}
        return whole.split(list(lengths.values()))[list(lengths).index("it")]

    def _decode(self, module: str, shape: tuple[int, ...]) -> CompressedTensor:
        try:
            made = self._layout.decode(self.arrays(module), self.schemes[module])
            if made.shape != shape:
                raise ValueError(f"it has shape {made.shape} where config.json says {shape}")
        except DAMAGE as error:
            raise UserError(
                f"{module} in {self._folder} is not what {self._layout.method} stores "
                f"({explained(error)}): fetch the model again."
            ) from error
        return made

    def arrays(self, module: str) -> dict[str, np.ndarray]:
        """What the files hold of a layer, by names within it; its bias is no part of that."""
        return {
            name: entry.open() for name, entry in self._stored[module].items() if name != "bias"
        }


def cached(description: Mapping[str, Any], where: Path) -> Any:
    """What a quantization_config says that keys and values are rounded onto."""
    try:
        return LAYOUTS[description["quant_method"]]().cached(description)
    except DAMAGE as error:
        raise UserError(
            f"{where} has a quantization_config that planish does not read: {explained(error)}."
        ) from error


def _module(place: Place) -> str:
    return place.name.removesuffix(".weight")


def readable(method: Any) -> bool:
    """Whether a quantization_config is of a layout that is read."""
    return isinstance(method, Mapping) and method.get("quant_method") in LAYOUTS
