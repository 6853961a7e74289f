"""Layers that a family keeps in one matrix, put together again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from algorithms.tensors import CompressedTensor, QuantizedInput, QuantizedTensor


def join(tensors: Sequence[CompressedTensor]) -> CompressedTensor:
    """The rows of several layers, one below the other.

    Raises ValueError, one sentence, where they do not share a form.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    if isinstance(first, QuantizedInput) and all(isinstance(t, QuantizedInput) for t in tensors):
        _require_equal(tensors, "format", "scale", "zero", "divisor")
        return dataclasses.replace(first, weight=join([t.weight for t in tensors]))  # type: ignore[attr-defined]
    if not all(isinstance(t, QuantizedTensor) for t in tensors):
        raise ValueError(
            "these layers are one matrix in other software, and not all of them are quantized: "
            "give all of them one method with a format."
        )
    assert isinstance(first, QuantizedTensor)
    if first.block[0] != 1:
        raise ValueError(
            "these layers are one matrix in other software, and their scales are of several rows, "
            "which join at no boundary: choose scales of single rows."
        )
    _require_equal(tensors, "element", "columns", "block", "divisor")
    return dataclasses.replace(
        first, **{key: _rows([getattr(t, key) for t in tensors])
                  for key in ("packed", "scale", "zero")}
    )  # fmt: skip


def _rows(parts: Sequence[Any]) -> Any:
    return None if parts[0] is None else jnp.concatenate(parts)


def _require_equal(tensors: Sequence[Any], *fields: str) -> None:
    for field in fields:
        values = [getattr(t, field) for t in tensors]
        if not all(_same(value, values[0]) for value in values):
            raise ValueError(
                f"these layers are one matrix in other software, and differ in {field}: give all "
                "of them one method and one format."
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, jax.core.Tracer):  # of shapes alone
        return True
    if hasattr(a, "shape") and hasattr(b, "shape"):
        return bool(np.array_equal(np.asarray(a), np.asarray(b)))
    return bool(a == b)
