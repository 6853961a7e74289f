"""The words of compressed-tensors for forms of ours: QuantizationArgs of weights and of inputs.

They are those of compressed-tensors 0.19 (vllm-project/compressed-tensors, quantization/
quant_args.py and quant_scheme.py), less what has its default there, so that older readers, which
know fewer words, read them too.
"""

from collections.abc import Mapping
from typing import Any

from algorithms import tensors
from algorithms.elements import Element, Integer, SmallFloat
from algorithms.formats import FLOATS, POWERS, Format
from algorithms.tensors import CompressedTensor, QuantizedInput, QuantizedTensor

Args = Mapping[str, Any]
BLOCK = 128  # rows and columns of the one block size that servers know
E4M3 = "float8_e4m3fn"
SPARSE = (
    "weights without their zeros since its version 0.15; export=safetensors writes them with, and "
    "export.sparse=bitmask as versions until 0.14 did"
)
NO_PLACE = {
    tensors.SumTensor: "a low-rank sum beside the weight; leave it out with correction=none, or "
    "take another algorithm than oats",
    tensors.LowRankTensor: "a product of two matrices; quantize the weight instead",
    tensors.CodebookTensor: "vectors of a codebook; take algorithm=gptq or another with a format",
    tensors.LatticeTensor: "points of a lattice; take algorithm=gptq or another with a format",
    tensors.TrellisTensor: "walks on a trellis; take algorithm=gptq or another with a format",
    tensors.RotatedTensor: "a rotation while the model runs; set rotation.online=[], which leaves "
    "the rotations that weights absorb",
    tensors.SparseTensor: SPARSE,
    tensors.BlockSparseTensor: SPARSE,
    tensors.DenseTensor: "rounding of the input of a weight that is not quantized",
}


def scheme_of(tensor: CompressedTensor) -> dict[str, Any]:
    """Format, weights and input_activations; raises ValueError for what has no place."""
    inputs = None
    if isinstance(tensor, QuantizedInput):
        inputs, tensor = _inputs(tensor), tensor.weight
    if not isinstance(tensor, QuantizedTensor):
        raise ValueError(f"compressed-tensors has no place for {_reason(tensor)}.")
    weights = _weights(tensor)
    return {
        "format": _format(weights, inputs is not None),
        "weights": weights,
        "input_activations": inputs,
    }


def _reason(tensor: CompressedTensor) -> str:
    """What there is no place for; of a rotation around it, what is within."""
    if isinstance(tensor, tensors.RotatedTensor) and type(tensor.weight) in NO_PLACE:
        return _reason(tensor.weight)
    name = type(tensor).__name__
    return NO_PLACE.get(type(tensor), f"a {name}; choose a method that rounds to a format")


def element_of(args: Args, *, zero: bool = False) -> Element:
    """What one code stands for; zero: whether zero points are stored."""
    if args["type"] == "int":
        return Integer(bits=args["num_bits"], symmetric=not zero)
    return SmallFloat(name={4: "e2m1", 8: "e4m3"}[args["num_bits"]])


def input_format(args: Args, scale_dtype: str | None) -> Format:
    """What inputs are rounded onto; scale_dtype: of stored scales, for static ones."""
    element: Element = (
        Integer(bits=args["num_bits"], symmetric=args["symmetric"])
        if args["type"] == "int"
        else element_of(args)
    )
    if is_nv(args):
        return Format(element=element, columns=16, scale_dtype=E4M3, nested=True)
    if is_mx(args):
        return Format(element=element, columns=32, scale_dtype=POWERS)
    rows = None if args["strategy"] == "tensor" else 1
    columns = args.get("group_size") if args["strategy"] == "group" else None
    return Format(element=element, rows=rows, columns=columns, scale_dtype=scale_dtype or "float32")


def block_of(args: Args, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) that share a scale in a weight of this shape; raises ValueError."""
    (o, i), strategy = shape, args["strategy"]
    if strategy in ("group", "tensor_group"):
        if args["group_size"] < 1 or i % args["group_size"]:
            raise ValueError(f"groups of {args['group_size']} do not divide {i} columns")
        return 1, args["group_size"]
    if strategy == "block":
        r, c = args["block_structure"]
        if min(r, c) < 1:
            raise ValueError(f"blocks of {r} x {c} hold nothing")
        return min(r, o), min(c, i)
    if strategy not in ("channel", "tensor"):
        raise ValueError(f"strategy {strategy} is not read for weights")
    return (1, i) if strategy == "channel" else (o, i)


def is_nv(args: Args) -> bool:
    return args["strategy"] == "tensor_group"


def is_mx(args: Args) -> bool:
    """Whether scales are powers of two, stored as their exponents."""
    return args["type"] == "float" and args.get("scale_dtype") == "torch.uint8"


def canonical(args: Mapping[str, Any]) -> Args:
    """Others' QuantizationArgs in our spelling; raises ValueError for what is not read."""
    group, strategy = args.get("group_size"), args.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    kind, bits = str(args.get("type", "int")).lower(), args.get("num_bits", 8)
    if kind == "int" and bits not in range(2, 9) or kind == "float" and bits not in (4, 8):
        raise ValueError(f"{kind} of {bits} bits is not read")
    symmetric = bool(args.get("symmetric", True))
    found = dict(_args(kind, bits, str(strategy).lower(), symmetric))
    found["dynamic"] = args.get("dynamic", False)
    if found["strategy"] in ("group", "tensor_group"):
        found["group_size"] = int(group or 0)
    if found["strategy"] == "block":
        found["block_structure"] = _block_structure(args.get("block_structure"))
    scale = str(args.get("scale_dtype") or "").removeprefix("torch.")
    if kind == "float" and (scale == "uint8" or bits == 4):
        found["scale_dtype"] = "torch." + (E4M3 if found["strategy"] == "tensor_group" else "uint8")
    if str(args.get("actorder")).lower() in ("group", "dynamic", "true"):
        found["actorder"] = "group"
    return found


def _block_structure(value: Any) -> list[int]:
    sides = value.split("x") if isinstance(value, str) else value
    try:
        r, c = (int(side) for side in sides)
    except (TypeError, ValueError):
        raise ValueError(f"block_structure={value!r} is not two numbers") from None
    return [r, c]


def _args(kind: str, bits: int, strategy: str, symmetric: bool = True, **more: Any) -> Args:
    return {
        "num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy,
        "dynamic": False, **more,
    }  # fmt: skip


def _weights(t: QuantizedTensor) -> Args:
    element, scale = t.element, str(t.scale.dtype)
    if isinstance(element, Integer):
        if scale not in FLOATS or t.divisor is not None:
            raise ValueError(f"compressed-tensors has no integers with scales of {scale}.")
        if t.zero is not None and str(t.zero.dtype) != "uint8":
            raise ValueError(
                "compressed-tensors has whole zero points alone, and these are "
                f"{t.zero.dtype}: set zero_dtype=uint8."
            )
        return _sharing(t, _args("int", element.bits, "", t.zero is None))
    name = element.name if isinstance(element, SmallFloat) else type(element).__name__
    if name == "e4m3" and scale in FLOATS and t.divisor is None:
        return _sharing(t, _args("float", 8, ""))
    if name in ("e2m1", "e4m3") and scale == POWERS and t.block == (1, 32):
        more: Args = {"group_size": 32, "scale_dtype": "torch.uint8"}
        return _args("float", element.bits, "group", **more)
    if name == "e2m1" and scale == E4M3 and t.divisor is not None and t.block == (1, 16):
        more = {"group_size": 16, "scale_dtype": f"torch.{E4M3}"}
        return _args("float", 4, "tensor_group", **more)
    raise ValueError(
        f"compressed-tensors has no {name} with scales of {scale} for {t.block} weights: it has "
        "integers of 2 to 8 bits, E4M3 with float scales, NVFP4 in groups of 16, and MXFP4 and "
        "MXFP8 in groups of 32."
    )


def _sharing(t: QuantizedTensor, args: Args) -> Args:
    """Which weights share a scale."""
    (o, i), (r, c) = t.shape, t.block
    if (r, c) == (1, i):
        return {**args, "strategy": "channel"}
    if r == 1:
        return {**args, "strategy": "group", "group_size": c}
    if (r, c) == (o, i):
        return {**args, "strategy": "tensor"}
    # A block that is cut off by the edge is that of a larger one, which other layers have too.
    r, c = BLOCK if r == o < BLOCK else r, BLOCK if c == i < BLOCK else c
    return {**args, "strategy": "block", "block_structure": [r, c]}


def _inputs(t: QuantizedInput) -> Args:
    f = t.format
    if f.search is not None:
        raise ValueError("compressed-tensors takes the whole range of an input: set search=null.")
    mx: Args = {"group_size": 32, "scale_dtype": "torch.uint8", "dynamic": True}
    nv: Args = {"group_size": 16, "scale_dtype": f"torch.{E4M3}", "dynamic": "local"}
    e = f.element
    kind, symmetric = ("int", e.symmetric) if isinstance(e, Integer) else ("float", True)
    name = e.name if isinstance(e, SmallFloat) else type(e).__name__
    if isinstance(e, Integer) and e.zero_dtype != "uint8" and not e.symmetric:
        raise ValueError("compressed-tensors has whole zero points alone: set zero_dtype=uint8.")
    if name in ("e2m1", "e4m3") and (f.rows, f.columns, f.scale_dtype) == (1, 32, POWERS):
        return _args(kind, e.bits, "group", **mx)
    if name == "e2m1" and (f.rows, f.columns, f.scale_dtype) == (1, 16, E4M3) and f.nested:
        if t.divisor is None or t.scale is not None:
            raise ValueError(
                "compressed-tensors keeps NVFP4's number for the whole input from calibration: "
                "take activations=nvfp4_static."
            )
        return _args(kind, 4, "tensor_group", **nv)
    if kind == "float" and name != "e4m3" or f.nested or f.scale_dtype not in (None, *FLOATS):
        raise ValueError(
            f"compressed-tensors has no inputs of {name} with scales of {f.scale_dtype}: it has "
            "integers, E4M3, NVFP4, MXFP4 and MXFP8."
        )
    return {**_args(kind, e.bits, "", symmetric), **_input_sharing(t, f)}


def _input_sharing(t: QuantizedInput, f: Format) -> Args:
    if t.scale is None and f.scale_dtype not in (None, "float32"):
        raise ValueError(
            f"compressed-tensors does not round an input's scale to {f.scale_dtype}: set "
            "activations.format.scale_dtype=float32."
        )
    if (f.rows, f.columns) == (None, None):
        return {"strategy": "tensor", "dynamic": t.scale is None}
    if f.rows != 1 or t.scale is not None:
        raise ValueError(
            f"compressed-tensors has no scale for {f.rows} tokens and {f.columns} channels: take "
            "one for each token (rows=1) or for all (rows=null columns=null)."
        )
    if f.columns is None:
        return {"strategy": "token", "dynamic": True}
    return {"strategy": "group", "group_size": f.columns, "dynamic": True}


def _format(weights: Args, rounds_input: bool) -> str:
    """How arrays are laid out, as the library itself would choose."""
    if is_nv(weights):
        return "nvfp4-pack-quantized"
    if is_mx(weights):
        return "mxfp4-pack-quantized" if weights["num_bits"] == 4 else "mxfp8-quantized"
    if weights["type"] == "int":
        return "int-quantized" if rounds_input else "pack-quantized"
    return "float-quantized" if rounds_input else "naive-quantized"
