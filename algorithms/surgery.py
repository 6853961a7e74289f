"""Find and replace NNX modules by path; the only [i, o] <-> [o, i] transpose.

`nnx.Linear` keeps its kernel as [in, out]; everything else in `algorithms` and in files speaks of
W [out, in], as papers do.
"""

import functools
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from algorithms.modules import QuantizedLinear
from algorithms.tensors import QuantizedTensor


def find(root: nnx.Module, path: str) -> nnx.Module:
    """The module at a dotted path; numbers index lists ("blocks.3.attention.q")."""
    try:
        return functools.reduce(_child, path.split("."), root)
    except (AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{type(root).__name__} has no module at path={path!r}.") from error


def _child(module: Any, name: str) -> Any:
    return module[int(name)] if name.isdigit() else getattr(module, name)


def linear_at(root: nnx.Module, path: str) -> nnx.Linear:
    """The linear layer at a dotted path; raises ValueError for anything else."""
    module = find(root, path)
    if not isinstance(module, nnx.Linear):
        raise ValueError(f"path={path!r} holds a {type(module).__name__}, not an nnx.Linear.")
    return module


def replace(root: nnx.Module, path: str, module: nnx.Module) -> None:
    """Put `module` in the place of what stands at a dotted path."""
    find(root, path)  # replace, never add
    parent, _, name = path.rpartition(".")
    holder = find(root, parent) if parent else root
    if name.isdigit():
        holder[int(name)] = module  # type: ignore[index]
    else:
        setattr(holder, name, module)


def get_weight(linear: nnx.Linear) -> Float[Array, "o i"]:
    return linear.kernel[...].T


def set_weight(linear: nnx.Linear, w: Float[Array, "o i"]) -> None:
    """Give a linear layer the weight W [o, i]; its shape must be the layer's own."""
    expected = (linear.out_features, linear.in_features)
    if w.shape != expected:
        raise ValueError(f"w.shape={w.shape} does not fit a linear layer of {expected}.")
    linear.kernel.set_value(w.T)


def quantize_linear(root: nnx.Module, path: str, tensor: QuantizedTensor) -> None:
    """Replace the linear layer at `path` by one that computes on `tensor`, its bias kept."""
    linear = linear_at(root, path)
    expected = (linear.out_features, linear.in_features)
    if tensor.shape != expected:
        raise ValueError(f"tensor.shape={tensor.shape} does not fit {path} of {expected}.")
    bias = None if linear.bias is None else linear.bias[...]
    replace(root, path, QuantizedLinear(tensor, bias))
