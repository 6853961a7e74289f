"""Flax modules out of a source, one piece at a time, without initializing weights first."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from algorithms import parametrization, surgery
from algorithms.kv_cache import SCALES
from algorithms.modules import CompressedExperts, CompressedLinear
from algorithms.tensors import CompressedTensor, ExpertsTensor
from experiments.checkpoints.sources import Rows, Source, tensor_name
from models.block import Block
from models.config import DecoderConfig
from models.decoder import Decoder, Stem, Tail, build_block

ENDS = ("embed.weight", "head.weight")  # with a row for each token of the vocabulary


def load_block(source: Source, layer: int, dtype: DTypeLike = jnp.float32) -> Block:
    """One transformer block, its arrays in `dtype`."""
    block = _empty_block(source, layer)
    return _fill(block, _stored(block, source, f"blocks.{layer}."), dtype)


def load_blocks(
    source: Source, dtype: DTypeLike = jnp.float32, *, start: int = 0
) -> Iterator[Block]:
    """The blocks from `start` on; the next one is read while the caller works on this one.

    It waits as it is stored: a view of a file has been looked through, so that the system holds
    its pages as long as there is room, and none of them is ours.
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as reader:

        def ahead(layer: int) -> concurrent.futures.Future[tuple[Block, list[_Stored]]] | None:
            more = layer < source.config.layers
            return reader.submit(_read_block, source, layer) if more else None

        upcoming = ahead(start)
        for layer in range(start, source.config.layers):
            assert upcoming is not None
            block, stored = upcoming.result()
            upcoming = ahead(layer + 1)
            made = [_fill(block, _emptying(stored), dtype)]
            del block  # the caller alone holds it
            yield made.pop()


def _read_block(source: Source, layer: int) -> tuple[Block, list["_Stored"]]:
    block = _empty_block(source, layer)
    return block, list(_stored(block, source, f"blocks.{layer}."))


def _empty_block(source: Source, layer: int) -> Block:
    return nnx.eval_shape(lambda: build_block(source.config, layer, rngs=nnx.Rngs(0)))


def _emptying(pieces: list["_Stored"]) -> Iterator["_Stored"]:
    """One after the other, each let go of when the next is asked for."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()


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
        if field in ("bias", *SCALES):
            getattr(module, field).set_value(value)
        elif isinstance(module, surgery.LinearLayer):
            surgery.set_weight(module, value)
        else:
            module.scale.set_value(value)


def load_stem(source: Source, dtype: DTypeLike = jnp.float32, *, rows: Rows | None = None) -> Stem:
    """What comes before the first block.

    rows: of the embedding, those tokens alone, numbered anew from 0 as they are given.
    """
    return _load(lambda: Stem(_of_rows(source.config, rows), rngs=nnx.Rngs(0)), source, dtype, rows)


def load_tail(source: Source, dtype: DTypeLike = jnp.float32, *, rows: Rows | None = None) -> Tail:
    """What follows the last block; its head, where the embedding serves, is the stem's.

    rows: of the head, those tokens alone.
    """
    return _load(lambda: Tail(_of_rows(source.config, rows), rngs=nnx.Rngs(0)), source, dtype, rows)


def load_model(source: Source, dtype: DTypeLike = jnp.float32) -> Decoder:
    """The whole model at once, for what fits memory."""
    return _load(lambda: Decoder(source.config, rngs=nnx.Rngs(0)), source, dtype)


def outline(source: Source) -> Decoder:
    """The whole model without memory: shapes alone, of compressed layers too."""
    module = nnx.eval_shape(lambda: Decoder(source.config, rngs=nnx.Rngs(0)))
    for path in parametrization.linear_layers(module):
        if source.packed(name := tensor_name((*path.split("."), "kernel"))):
            biased = getattr(surgery.find(module, path), "bias", None) is not None
            made = functools.partial(_packed_layer, source, name, biased)
            surgery.replace(module, path, nnx.eval_shape(made))
    return module


def _packed_layer(source: Source, name: str, biased: bool) -> nnx.Module:
    tensor = source.tensor(name)
    if isinstance(tensor, ExpertsTensor):
        return CompressedExperts(tensor)
    return CompressedLinear(tensor, jnp.zeros(tensor.shape[0]) if biased else None)


def _of_rows(config: DecoderConfig, rows: Rows | None) -> DecoderConfig:
    if rows is None:
        return config
    return dataclasses.replace(config, vocabulary=len(np.arange(config.vocabulary)[rows]))


class _Stored(NamedTuple):
    path: str  # of the module
    field: str
    tensor: Any  # as the source gives it


def _load[M: nnx.Module](
    build: Callable[[], M], source: Source, dtype: Any, rows: Rows | None = None
) -> M:
    """Build a module without computing anything and fill it from its own paths."""
    module = nnx.eval_shape(build)
    return _fill(module, _stored(module, source, rows=rows), dtype)


def _stored(
    module: nnx.Module, source: Source, prefix: str = "", rows: Rows | None = None
) -> Iterator[_Stored]:
    """Every tensor of a module, by `prefix` + its own path, one after the other."""
    # A layer's bias comes before its kernel, which may replace the layer.
    for path, _ in sorted(nnx.to_flat_state(nnx.state(module)), key=lambda item: str(item[0])):
        *parts, field = (str(part) for part in path)
        name = prefix + tensor_name(path)
        if rows is not None and name in ENDS:
            tensor = source.rows(name, rows)
        else:
            tensor = source.tensor(name)
        yield _Stored(".".join(parts), field, tensor)


def _fill[M: nnx.Module](module: M, stored: Iterator[_Stored], dtype: Any) -> M:
    for path, field, tensor in stored:
        _place(module, path, field, tensor, dtype)
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
    x = jnp.array(tensor)  # a copy: the source's array may be a view of its file
    if field == "kernel":
        surgery.set_weight(module, x, dtype)
    else:
        getattr(module, field).set_value(x.astype(dtype))


def _require_filled(root: nnx.Module) -> None:
    """Our own mistake, never the user's: a source has every tensor of its config."""
    for path, value in nnx.to_flat_state(nnx.state(root)):
        leaves = jax.tree.leaves(value)
        assert not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves), path
