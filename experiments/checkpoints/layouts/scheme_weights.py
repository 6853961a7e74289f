"""A quantized weight as compressed-tensors keeps it, by its scheme; see compressed_tensors.py."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from algorithms.elements import Integer
from algorithms.tensors import QuantizedTensor
from experiments.checkpoints.layouts import codes, schemes
from experiments.checkpoints.layouts.base import Arrays, Scheme
from kernels import packing

FLOATS = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
FP8, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)


def encode(t: QuantizedTensor, scheme: Scheme) -> dict[str, np.ndarray]:
    """Its arrays by name; raises ValueError for zero points that its bits do not hold."""
    args, scale, o = scheme["weights"], np.asarray(t.scale), t.shape[0]
    if args["strategy"] == "tensor":
        scale = scale.reshape(1)
    if schemes.is_mx(args):
        scale = scale.view(np.uint8)
    found = {"weight_scale": scale}
    if scheme["format"] == "pack-quantized":
        found["weight_packed"] = codes.words(np.asarray(t.packed), t.columns, args["num_bits"])
        found["weight_shape"] = np.array(t.shape, np.int64)
    elif args["num_bits"] == 4 and args["type"] == "float":
        found["weight_packed"] = np.asarray(t.packed)
    elif args["type"] == "float":
        found["weight"] = np.asarray(t.codes()).view(FP8)
    else:
        found["weight"] = codes.signed(np.asarray(t.codes()), args["num_bits"])
    if t.divisor is not None:
        found["weight_global_scale"] = np.asarray(t.divisor, np.float32).reshape(1)
    if t.zero is not None:
        zero = np.asarray(t.zero)
        if int(zero.max(initial=0)) >= 2 ** args["num_bits"]:
            raise ValueError(f"zero points up to {zero.max()} do not fit {args['num_bits']} bits.")
        found["weight_zero_point"] = _encode_zero(zero, scheme, o)
    return found


def _encode_zero(zero: np.ndarray, scheme: Scheme, rows: int) -> np.ndarray:
    args = scheme["weights"]
    if not _packs_zero(scheme):
        signed = codes.signed(zero, args["num_bits"])
        return signed.reshape(1) if args["strategy"] == "tensor" else signed
    packed = np.asarray(packing.pack(jnp.asarray(zero.T), args["num_bits"]))
    return np.ascontiguousarray(codes.words(packed, rows, args["num_bits"]).T)


def _packs_zero(scheme: Scheme) -> bool:
    strategy = scheme["weights"]["strategy"]
    return scheme["format"] == "pack-quantized" and strategy in ("group", "channel")


def decode(arrays: Arrays, scheme: Scheme) -> QuantizedTensor:
    """The tensor again; raises ValueError for arrays that do not fit."""
    args = scheme["weights"]
    packed, columns = _packed(arrays, scheme)
    shape = (packed.shape[0], columns)
    block = schemes.block_of(args, shape)
    table = (-(-shape[0] // block[0]), -(-columns // block[1]))
    zero = _decode_zero(arrays, scheme, shape[0], table)
    scale, block = _ordered(_scale(arrays, args, table), arrays, args, block, columns)
    if zero is not None:
        zero = _ordered(zero, arrays, args, (1, columns // table[1]), columns)[0]
    divisor = jnp.asarray(codes.one(arrays, "weight_global_scale")) if schemes.is_nv(args) else None
    made = QuantizedTensor(
        jnp.asarray(packed), jnp.asarray(scale), None if zero is None else jnp.asarray(zero),
        divisor, schemes.element_of(args, zero=zero is not None), columns, block,
    )  # fmt: skip
    assert isinstance(made.element, Integer) or zero is None
    made.validate()
    return made


def _packed(arrays: Arrays, scheme: Scheme) -> tuple[np.ndarray, int]:
    """Codes as we pack them, and how many columns they are."""
    args = scheme["weights"]
    bits = args["num_bits"]
    if scheme["format"] == "pack-quantized":
        words, shape = (
            codes.array(arrays, "weight_packed", np.int32),
            codes.array(arrays, "weight_shape"),
        )
        rows, columns = (int(n) for n in shape.reshape(-1)[-2:])
        if words.shape != (rows, expected := -(-columns * bits // 32)):
            raise ValueError(
                f"weight_packed has shape {words.shape} where {rows} rows of {columns} codes of "
                f"{bits} bits take {(rows, expected)}"
            )
        return codes.packed_bytes(words, columns, bits), columns
    if bits == 4 and args["type"] == "float":
        packed = codes.array(arrays, "weight_packed", np.uint8)
        return packed, 2 * packed.shape[1]
    if args["type"] == "float":
        found = codes.array(arrays, "weight", FP8).view(np.uint8)
        if (found & 0x7F == 0x7F).any():
            raise ValueError("weight holds NaN")
    else:
        found = codes.unsigned(codes.array(arrays, "weight", np.int8), bits)
    return np.asarray(packing.pack(jnp.asarray(found), bits)), found.shape[1]


def _scale(arrays: Arrays, args: Mapping[str, Any], table: tuple[int, int]) -> np.ndarray:
    dtype = FP8 if schemes.is_nv(args) else np.uint8 if schemes.is_mx(args) else None
    scale = codes.array(arrays, "weight_scale", dtype)
    if dtype is None and scale.dtype not in FLOATS:
        raise ValueError(f"weight_scale is {scale.dtype} where a float of 16 or 32 bits is read")
    if schemes.is_mx(args):
        scale = scale.view(E8M0)
    if not np.isfinite(scale.astype(np.float32)).all():
        raise ValueError("weight_scale holds NaN or infinity")
    return codes.shaped(scale, "weight_scale", table)


def _decode_zero(
    arrays: Arrays, scheme: Scheme, rows: int, table: tuple[int, int]
) -> np.ndarray | None:
    """None where they are the symmetric grid's own; older files store those too."""
    args = scheme["weights"]
    bits = args["num_bits"]
    if args["symmetric"] and "weight_zero_point" not in arrays or args["type"] == "float":
        return None
    stored = codes.array(arrays, "weight_zero_point")
    if args["symmetric"]:
        if stored.any():
            raise ValueError("weight_zero_point is not zero though the grid is symmetric")
        return None
    if not _packs_zero(scheme):
        zero = codes.array(arrays, "weight_zero_point", np.int8)
        return codes.unsigned(codes.shaped(zero, "weight_zero_point", table), bits)
    words = codes.array(arrays, "weight_zero_point", np.int32).T
    words = codes.shaped(words, "weight_zero_point", (table[1], -(-rows * bits // 32)))
    return np.asarray(
        packing.unpack(jnp.asarray(codes.packed_bytes(words, rows, bits)), bits, rows)
    ).T


def _ordered(
    x: np.ndarray, arrays: Arrays, args: Mapping[str, Any], block: tuple[int, int], columns: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """A table whose groups are consecutive columns, from one whose groups are named column by
    column; and the columns of its groups.
    """
    if args.get("actorder") != "group":
        return x, block
    group = codes.array(arrays, "weight_g_idx").reshape(-1)
    if group.shape != (columns,) or group.min() < 0 or group.max() >= x.shape[1]:
        raise ValueError(f"weight_g_idx does not name one of {x.shape[1]} groups for each column")
    run = next(
        c for c in range(block[1], 0, -1)
        if columns % c == 0 and (group.reshape(-1, c) == group[::c, None]).all()
    )  # fmt: skip
    return x[:, group[::run]], (1, run)
