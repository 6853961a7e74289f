"""What a model costs to store, every tensor counted: codes with their padding, scales, zero points,
norms, biases and the embedding."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.config import DecoderConfig


class Footprint(NamedTuple):
    """Bits by what they are spent on."""

    weights: int  # numbers in compressed weights
    weight_bits: int
    parameters: int  # numbers in the whole model
    model_bits: int
    multiplications: int | None = None  # per token, of blocks and head; None: not on record

    @property
    def bits_per_weight(self) -> float:
        """Over the compressed layers, scales and zero points included; nan if there are none."""
        return self.weight_bits / self.weights if self.weights else float("nan")

    @property
    def megabytes(self) -> float:
        """Of all tensors, 10⁶ bytes."""
        return self.model_bits / 8e6


def footprint(config: DecoderConfig, tensors: Mapping[str, Mapping[str, Any]]) -> Footprint:
    """From the description of a checkpoint's tensors: kind, shape and storage bits of each."""
    everything = list(tensors.values())
    compressed = [tensor for tensor in everything if tensor["kind"] != "dense"]
    return Footprint(*_count(compressed), *_count(everything), _multiplications(config, tensors))


def _multiplications(config: DecoderConfig, tensors: Mapping[str, Mapping[str, Any]]) -> int | None:
    """By all matrices that a token passes through; None if the checkpoint is of an earlier version,
    which did not say how many numbers a compressed one has.
    """
    total = config.vocabulary * config.hidden if config.predicts else 0
    for name, tensor in tensors.items():
        if not name.startswith("blocks.") or len(tensor["shape"]) < 2:
            continue
        *experts, o, i = tensor["shape"]
        one = tensor.get("multiplications") if tensor["kind"] != "dense" else o * i
        if one is None:
            return None
        total += one * (config.experts.chosen if experts and config.experts else 1)
    return total


def _count(tensors: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    numbers = bits = 0
    for tensor in tensors:
        size = 1
        for dimension in tensor["shape"]:
            size *= dimension
        numbers, bits = numbers + size, bits + tensor["storage_bits"]
    return numbers, bits


def bytes_on_disk(path: Path) -> int:
    """All files below a folder, or one file."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
