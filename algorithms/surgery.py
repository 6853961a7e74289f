"""Find and replace NNX modules by path; the only [i, o] <-> [o, i] transpose.

`nnx.Linear` keeps its kernel as [in, out]; everything else in `algorithms` and in files speaks of
W [out, in], as papers do. Experts' layers have a matrix for each expert, [e, in, out].
"""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from algorithms.modules import CompressedExperts, CompressedLinear
from algorithms.tensors import CompressedTensor, ExpertsTensor


@runtime_checkable
class LinearLayer(Protocol):
    """An `nnx.Linear`, or the same for each expert."""

    kernel: Any  # nnx.Param, [*e, in, out]


def find(root: nnx.Module, path: str) -> nnx.Module:
    """The module at a dotted path; numbers index lists ("blocks.3.attention.q")."""
    try:
        return functools.reduce(_child, path.split("."), root)
    except (AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{type(root).__name__} has no module at path={path!r}.") from error


def _child(module: Any, name: str) -> Any:
    return module[int(name)] if name.isdigit() else getattr(module, name)


def linear_at(root: nnx.Module, path: str) -> LinearLayer:
    """The linear layer at a dotted path; raises ValueError for anything else."""
    module = find(root, path)
    if not isinstance(module, LinearLayer):
        raise ValueError(f"path={path!r} holds a {type(module).__name__}, no linear layer.")
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


def weight_shape(linear: LinearLayer) -> tuple[int, ...]:
    *experts, i, o = linear.kernel.get_value().shape
    return (*experts, o, i)


def get_weight(linear: LinearLayer) -> Float[Array, "*e o i"]:
    return linear.kernel[...].swapaxes(-1, -2)


def release_weight(linear: LinearLayer) -> None:
    """Let go of the weight, its shape and dtype kept: another one is set before it computes."""
    kernel = linear.kernel.get_value()
    linear.kernel.set_value(jax.ShapeDtypeStruct(kernel.shape, kernel.dtype))


def release(module: nnx.Module) -> None:
    """Let go of everything in a module that has done its work: modules are in cycles, and so are
    there until the collector comes by, long after the next one has been loaded.
    """
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            node.set_value(None)


def set_weight(
    linear: LinearLayer, w: Float[Array, "*e o i"], dtype: DTypeLike | None = None
) -> None:
    """Give a linear layer the weight W [o, i], as `dtype`; its shape must be the layer's own."""
    if w.shape != (expected := weight_shape(linear)):
        raise ValueError(f"w.shape={w.shape} does not fit a linear layer of {expected}.")
    linear.kernel.set_value(_kernel(w, dtype=dtype or w.dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def _kernel(w: Float[Array, "*e o i"], *, dtype: Any) -> Float[Array, "*e i o"]:
    """In one step, so that no third copy of a large weight is made on the way."""
    return w.swapaxes(-1, -2).astype(dtype)


def linear(w: Float[Array, "o i"], bias: Float[Array, " o"] | None = None) -> nnx.Linear:
    """A linear layer of a given weight."""
    o, i = w.shape
    made = nnx.eval_shape(lambda: nnx.Linear(i, o, use_bias=bias is not None, rngs=nnx.Rngs(0)))
    set_weight(made, w)
    if made.bias is not None and bias is not None:
        made.bias.set_value(bias)
    return made


def compress_linear(root: nnx.Module, path: str, tensor: CompressedTensor) -> None:
    """Replace the linear layer at `path` by one that computes on `tensor`, its bias kept."""
    linear: Any = linear_at(root, path)
    if tensor.shape != (expected := weight_shape(linear)):
        raise ValueError(f"tensor.shape={tensor.shape} does not fit {path} of {expected}.")
    if isinstance(tensor, ExpertsTensor):
        replace(root, path, CompressedExperts(tensor))
        return
    bias = None if linear.bias is None else linear.bias[...]
    replace(root, path, CompressedLinear(tensor, bias))


def absorb_scale(block: nnx.Module, site: Any, scale: Float[Array, " i"]) -> None:
    """Divide a site's activation by `scale` in its producer, and multiply its readers by it.

    Where the producer has fewer channels than the activation (key-value heads that serve several
    query heads), the channels that share one take the geometric mean of their scales.
    """
    producer: Any = find(block, site.producer)
    if site.per_head:
        attention: Any = find(block, site.producer.rpartition(".")[0])
        heads = attention.kv_heads, -1, attention.head_size
        own = jnp.exp(jnp.log(scale).reshape(heads).mean(1, keepdims=True))
        scale = jnp.broadcast_to(own, scale.reshape(heads).shape).reshape(-1)
        own = own.reshape(-1)
    else:
        own = scale
    for path in site.readers:
        linear = linear_at(block, path)
        set_weight(linear, get_weight(linear) * scale[None])
    if isinstance(producer, nnx.Linear):
        set_weight(producer, get_weight(producer) / own[:, None])
        if producer.bias is not None:
            producer.bias.set_value(producer.bias[...] / own)
    else:
        producer.scale.set_value(producer.scale[...] / own)
        if getattr(producer, "bias", None) is not None:  # a norm that subtracts a mean has one
            producer.bias.set_value(producer.bias[...] / own)
