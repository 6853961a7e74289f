"""A trained decoder as a checkpoint, which everything else reads."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from algorithms.tensors import CompressedTensor
from experiments.checkpoints.planish import CheckpointWriter, Tensor, part_of
from experiments.checkpoints.sources import tensor_name
from experiments.data.tokenizer import Tokenizer
from models.decoder import Decoder


def save(
    model: Decoder, folder: Path, tokenizer: Tokenizer, notes: Mapping[str, Any], *,
    check: Callable[[], None],
) -> None:  # fmt: skip
    """Write a checkpoint whole or not at all, weights in the dtypes that they have."""
    writer = CheckpointWriter(folder, check=check)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(model).items():
        parts.setdefault(part_of(name), {})[name] = tensor
    for part, inside in parts.items():
        if part not in writer.parts:
            writer.write(part, inside)
    writer.finish(model.config, tokenizer, notes)


def tensors(model: Decoder) -> dict[str, Tensor]:
    """Everything that a checkpoint holds of a model, by the names of `sources`."""
    found: dict[str, Tensor] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        if isinstance(value, CompressedTensor):
            found[tensor_name((*path[:-1], "kernel"))] = value
            continue
        x = np.asarray(value)
        found[tensor_name(path)] = x.swapaxes(-1, -2) if path[-1] == "kernel" else x
    return found
