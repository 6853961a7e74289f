"""Flax modules out of a source, one piece at a time, without initializing weights first."""

import concurrent.futures
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from algorithms import surgery
from algorithms.tensors import CompressedTensor
from experiments.checkpoints.sources import Source, tensor_name
from models.block import Block
from models.decoder import Decoder, Stem, Tail, build_block


def load_block(source: Source, layer: int, dtype: DTypeLike = jnp.float32) -> Block:
    """One transformer block, its arrays in `dtype`."""
    return _load(
        lambda: build_block(source.config, layer, rngs=nnx.Rngs(0)),
        source,
        f"blocks.{layer}.",
        dtype,
    )


def load_blocks(
    source: Source, dtype: DTypeLike = jnp.float32, *, start: int = 0
) -> Iterator[Block]:
    """The blocks from `start` on; the next one is read while the caller works on this one."""
    layers = range(start, source.config.layers)
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = reader.submit(load_block, source, start, dtype) if layers else None
        for layer in layers:
            assert upcoming is not None
            block = upcoming.result()
            more = layer + 1 in layers
            upcoming = reader.submit(load_block, source, layer + 1, dtype) if more else None
            yield block


def parameters(block: Block) -> dict[str, np.ndarray]:
    """A block's arrays by name within it, linear weights as [o, i]."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(block)):
        x = np.asarray(variable[...])
        found[tensor_name(path)] = x.swapaxes(-1, -2) if path[-1] == "kernel" else x
    return found


def put(block: Block, arrays: Mapping[str, Any]) -> None:
    """Give a block dense arrays by name within it, as `parameters` does."""
    for name, x in arrays.items():
        path, _, field = name.rpartition(".")
        module: Any = surgery.find(block, path)
        value = jnp.asarray(x, jnp.float32)
        if field == "bias":
            module.bias.set_value(value)
        elif isinstance(module, surgery.LinearLayer):
            surgery.set_weight(module, value)
        else:
            module.scale.set_value(value)


def load_stem(source: Source, dtype: DTypeLike = jnp.float32) -> Stem:
    """What comes before the first block."""
    return _load(lambda: Stem(source.config, rngs=nnx.Rngs(0)), source, "", dtype)


def load_tail(source: Source, dtype: DTypeLike = jnp.float32) -> Tail:
    """What follows the last block; its head, where the embedding serves, is the stem's."""
    return _load(lambda: Tail(source.config, rngs=nnx.Rngs(0)), source, "", dtype)


def load_model(source: Source, dtype: DTypeLike = jnp.float32) -> Decoder:
    """The whole model at once, for what fits memory."""
    return _load(lambda: Decoder(source.config, rngs=nnx.Rngs(0)), source, "", dtype)


def _load[M: nnx.Module](build: Callable[[], M], source: Source, prefix: str, dtype: Any) -> M:
    """Build a module without computing anything and fill it from `prefix` + its own paths."""
    module = nnx.eval_shape(build)
    # A layer's bias comes before its kernel, which may replace the layer.
    for path, _ in sorted(nnx.to_flat_state(nnx.state(module)), key=lambda item: str(item[0])):
        *parts, field = (str(part) for part in path)
        name = prefix + tensor_name(path)
        _place(module, ".".join(parts), field, source.tensor(name), dtype)
    _require_filled(module)
    return module


def _place(root: nnx.Module, path: str, field: str, tensor: Any, dtype: Any) -> None:
    """Put one tensor where it belongs; a compressed one brings its own layer.

    A compressed embedding is unpacked: a table is read by rows, which packed forms do not give.
    """
    module: Any = surgery.find(root, path)
    if isinstance(tensor, CompressedTensor) and isinstance(module, surgery.LinearLayer):
        surgery.compress_linear(root, path, tensor)
        return
    if isinstance(tensor, CompressedTensor):
        tensor = tensor.dequantize()
    x = jnp.array(tensor, dtype)  # a copy: the source's array may be a view of its file
    if field == "kernel":
        surgery.set_weight(module, x)
    else:
        getattr(module, field).set_value(x)


def _require_filled(root: nnx.Module) -> None:
    """Our own mistake, never the user's: a source has every tensor of its config."""
    for path, value in nnx.to_flat_state(nnx.state(root)):
        leaves = jax.tree.leaves(value)
        assert not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves), path
