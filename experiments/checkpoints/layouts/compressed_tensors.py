"""compressed-tensors: what llm-compressor writes and transformers, vLLM and SGLang load.

    what                               format                 arrays of a layer
    INT2 to INT8, weights alone        pack-quantized         weight_packed, weight_scale,
                                                              weight_shape, weight_zero_point
    INT2 to INT8 with rounded inputs   int-quantized          weight, weight_scale,
                                                              weight_zero_point, input_scale, …
    FP8 E4M3 with rounded inputs       float-quantized        weight, weight_scale, input_scale
    FP8 E4M3, weights alone            naive-quantized        weight, weight_scale
    NVFP4                              nvfp4-pack-quantized   weight_packed, weight_scale,
                                                              weight_global_scale,
                                                              input_global_scale
    MXFP4                              mxfp4-pack-quantized   weight_packed, weight_scale
    MXFP8                              mxfp8-quantized        weight, weight_scale

Scales are shared per group, channel, tensor or block (E4M3: 128 x 128); inputs are rounded per
token, group or tensor. transformers runs all of it; servers run what they have kernels for, which
for integers is 4 and 8 bits mostly.

Facts, of compressed-tensors 0.19 (compressors/*/base.py):
- Packed codes are one little-endian bit stream per row in int32 words, as ours in bytes; signed
  codes are offset by 2^(bits-1). Zero points of groups and channels are packed too, down columns.
- Global scales divide: w = code · weight_scale / weight_global_scale, our `divisor`.
- FP4 has its first code in the low half of a byte. Scales of MX are exponents with bias 127.
- A name of a module goes before a pattern ("re:…", from the name's beginning), that before a class.

GPTQ's activation order needs nothing here: ours takes groups of consecutive columns, whichever it
rounds first. Others' `weight_g_idx`, which gives columns groups in any order, is read exactly, with
a scale for every run of columns that stay together.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from algorithms.elements import Integer
from algorithms.tensors import CompressedTensor, QuantizedInput, QuantizedTensor
from experiments.checkpoints.layouts import codes, schemes
from experiments.checkpoints.layouts.base import Arrays, Layout, Scheme
from kernels import packing

VERSION = "0.19.0"  # of the library whose conventions these are
TABLES = ("embed_tokens", "wte")  # modules that are no linear layers
FLOATS = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
FP8, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip


class CompressedTensors(Layout):
    """`quant_method: compressed-tensors`."""

    method = "compressed-tensors"
    tables = True

    def scheme(self, tensor: CompressedTensor) -> Scheme:
        return schemes.scheme_of(tensor)

    def encode(self, tensor: CompressedTensor) -> Arrays:
        scheme = self.scheme(tensor)
        found: dict[str, np.ndarray] = {}
        if isinstance(tensor, QuantizedInput):
            found, tensor = _encode_input(tensor, scheme["input_activations"]), tensor.weight
        assert isinstance(tensor, QuantizedTensor)
        return found | _encode_weight(tensor, scheme)

    def decode(self, arrays: Arrays, scheme: Scheme) -> CompressedTensor:
        weight = _decode_weight(arrays, scheme)
        args = scheme["input_activations"]
        if args is None:
            return weight
        scale = zero = divisor = None
        if schemes.is_nv(args):
            divisor = jnp.asarray(codes.one(arrays, "input_global_scale"))
        elif not args["dynamic"]:
            scale = jnp.asarray(codes.one(arrays, "input_scale").reshape(1, 1))
            if not args["symmetric"]:
                zero = codes.one(arrays, "input_zero_point", np.int8).reshape(1, 1)
                zero = jnp.asarray(codes.unsigned(zero, args["num_bits"]), scale.dtype)
        stored = None if scale is None else str(scale.dtype)
        return QuantizedInput(weight, scale, zero, divisor, schemes.input_format(args, stored))

    def describe(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
        groups: dict[str, list[str]] = {}
        for name, scheme in schemes.items():
            if scheme is not None:
                groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(name)
        described = {}
        for number, (scheme, names) in enumerate(groups.items()):
            # Names alone where there are several: servers look a fused layer's class up first.
            linear = [] if len(groups) > 1 else ["Linear"]
            named = names if len(groups) > 1 else [n for n in names if _is_table(n)]
            group = {"targets": [*linear, *named], **json.loads(scheme)}
            described[f"group_{number}"] = group | {"output_activations": None}
        formats = {group["format"] for group in described.values()}
        return {
            "quant_method": self.method,
            "version": VERSION,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": described,
            "ignore": [n for n, s in schemes.items() if s is None and not _is_table(n)],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def parse(
        self, description: Mapping[str, Any], layers: Collection[str]
    ) -> dict[str, Scheme | None]:
        _require_weights_alone(description)
        groups, ignore = description.get("config_groups"), description.get("ignore") or []
        if not isinstance(groups, Mapping) or not all(
            isinstance(group, Mapping) for group in groups.values()
        ):
            raise ValueError("its config_groups are not schemes written out in full")
        targets = {t: group for group in groups.values() for t in group.get("targets") or []}
        chosen = {
            layer: None if _first(ignore, layer) else _first(targets, layer) for layer in layers
        }
        made = {t: _scheme(targets[t], description) for t in set(chosen.values()) - {None}}
        return {layer: None if t is None else made[t] for layer, t in chosen.items()}


def _is_table(name: str) -> bool:
    return name.rpartition(".")[2] in TABLES


def _first(targets: Iterable[str], name: str) -> str | None:
    """The target that counts for a module: by name, else by pattern, else by class."""
    ordered = sorted(targets, key=lambda target: (target.startswith("re:"), target))
    kind = "Embedding" if _is_table(name) else "Linear"
    for target in ordered:
        pattern = target.removeprefix("re:")
        if target == name or pattern != target and re.match(pattern, name):
            return target
    return kind if kind in ordered else None


def _require_weights_alone(description: Mapping[str, Any]) -> None:
    if (status := description.get("quantization_status", "compressed")) != "compressed":
        raise ValueError(f"its layers are {status} rather than compressed")
    if description.get("kv_cache_scheme") is not None:
        raise ValueError("it rounds the key-value cache, which is not read")
    if description.get("transform_config"):
        raise ValueError("it turns activations while it runs, which is not read")
    sparsity = description.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ValueError(f"its weights are stored sparse ({sparsity['format']}), which is not read")


def _scheme(group: Mapping[str, Any], description: Mapping[str, Any]) -> Scheme:
    if group.get("output_activations") is not None:
        raise ValueError("it rounds outputs of layers, which is not read")
    if group.get("weights") is None:
        raise ValueError("it rounds inputs of layers whose weights are dense, which is not read")
    format, inputs = group.get("format") or description.get("format"), group["input_activations"]
    if format not in FORMATS:
        raise ValueError(f"its format {format} is not read, which {', '.join(FORMATS)} are")
    weights = schemes.canonical(group["weights"])
    inputs = None if inputs is None else schemes.canonical(inputs)
    return {"format": format, "weights": weights, "input_activations": inputs}


def _encode_weight(t: QuantizedTensor, scheme: Scheme) -> dict[str, np.ndarray]:
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


def _encode_input(t: QuantizedInput, args: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = {}
    if t.divisor is not None:
        found["input_global_scale"] = np.asarray(t.divisor, np.float32).reshape(1)
    if t.scale is not None:
        found["input_scale"] = np.asarray(t.scale).reshape(1)
    if t.zero is not None:
        found["input_zero_point"] = codes.signed(np.asarray(t.zero), args["num_bits"]).reshape(1)
    return found


def _decode_weight(arrays: Arrays, scheme: Scheme) -> QuantizedTensor:
    args = scheme["weights"]
    bits = args["num_bits"]
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
