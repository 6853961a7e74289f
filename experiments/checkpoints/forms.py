"""Compressed tensors as a checkpoint keeps them: arrays by path, and JSON that says what they make.

A tensor is a dataclass of arrays, None and other tensors (data), and of plain values and frozen
dataclasses of them (meta). Only the classes named here are ever built: reading runs no other code.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from algorithms import tensors
from algorithms.elements import ELEMENTS, Element
from algorithms.formats import Format
from algorithms.tensors import CompressedTensor

FORMS: dict[str, type[CompressedTensor]] = {
    name: form
    for name, form in vars(tensors).items()
    if isinstance(form, type)
    and issubclass(form, CompressedTensor)
    and form is not CompressedTensor
}
PLAIN = (int, float, str, bool, type(None))


def fields(tensor: CompressedTensor, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a tensor by path: "weight.packed". Small floats are kept as their bytes."""
    found: dict[str, np.ndarray] = {}
    for field in dataclasses.fields(tensor):  # type: ignore[arg-type]
        value = getattr(tensor, field.name)
        if isinstance(value, CompressedTensor):
            found |= fields(value, f"{prefix}{field.name}.")
        elif _is_array(value):
            array = np.asarray(value)
            small = array.dtype.itemsize == 1 and array.dtype != np.int8
            found[f"{prefix}{field.name}"] = array.view(np.uint8) if small else array
    return found


def describe(tensor: CompressedTensor) -> dict[str, Any]:
    """What JSON keeps: the class, meta fields, the dtype of each array, nested tensors."""
    described: dict[str, Any] = {"class": type(tensor).__name__}
    for field in dataclasses.fields(tensor):  # type: ignore[arg-type]
        value = getattr(tensor, field.name)
        if isinstance(value, CompressedTensor):
            described[field.name] = describe(value)
        elif _is_array(value):
            described[field.name] = {"dtype": str(value.dtype)}
        else:
            described[field.name] = _meta(value)
    return described


def tensor(described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> CompressedTensor:
    """The tensor again; raises ValueError, a clause, for a class that is not known, and whatever
    its arrays and fields make its class raise.
    """
    made = _build(described, arrays, "")
    if not isinstance(made, CompressedTensor):
        raise ValueError(f"a {type(made).__name__} is no tensor")
    made.validate()
    return made


def _build(described: Mapping[str, Any], arrays: Mapping[str, np.ndarray], path: str) -> Any:
    name = described["class"]
    known: Mapping[str, type] = FORMS | ELEMENTS | {"Format": Format}
    if name not in known:
        raise ValueError(f"it holds a {name}, which the version that wrote it may know")
    values = {
        key: _value(value, arrays, f"{path}{key}")
        for key, value in described.items()
        if key != "class"
    }
    return known[name](**values)


def _value(value: Any, arrays: Mapping[str, np.ndarray], path: str) -> Any:
    if isinstance(value, Mapping) and "class" in value:
        return _build(value, arrays, f"{path}.")
    if isinstance(value, Mapping):
        dtype = np.dtype(getattr(ml_dtypes, value["dtype"], value["dtype"]))
        return jnp.array(arrays[path].view(dtype))
    return tuple(value) if isinstance(value, list) else value


def _meta(value: Any) -> Any:
    if isinstance(value, Element | Format):
        own = {f.name: _meta(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"class": type(value).__name__, **own}
    if isinstance(value, tuple):
        return [_meta(item) for item in value]
    assert isinstance(value, PLAIN), value
    return value


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")
