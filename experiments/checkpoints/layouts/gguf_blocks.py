"""Tensors as the blocks of ggml, llama.cpp's library, and back: exactly, or not at all.

A block is 32 or 256 consecutive numbers of a row with one float16 scale d. With q the block's
codes, W is d (q - middle) in Q4_0, Q5_0, Q8_0, Q3_K and Q6_K, and d q + m in Q4_1, Q5_1, Q2_K, Q4_K
and Q5_K. Our grids are s (code - zero), and where they go is a matter of arithmetic:

- The steps code - zero are whole numbers of a known range, and a block whose range covers it holds
  them with the same scale: s in float16 times a step is exact in float32 in any order. Asymmetric
  grids of b bits have steps of ±(2^b - 1), which takes b + 1 bits: 4 bits go into Q5_0.
- m is stored in float16 in Q4_1 and Q5_1, where -s zero is rarely exact: they are used where they
  are asked for, and refused unless every m is exact.
- The 256 numbers of a K block have small integer scales of their own beside d. A group that fills
  such a block is held with all of them 1, and m = -s zero as an integer times s: exact, for 2 bits
  at 2.6 and 3 bits at 3.4 bits a number. Smaller groups would need scales of 6 bits.
- MXFP4 is OCP's, 32 codes of E2M1 with a power of two. Negative zero comes back as zero.

A group of several blocks repeats its scale. Facts from the `gguf` package (quants.py, constants.py,
0.19.0) of ggml-org/llama.cpp (MIT), whose dequantizer is the oracle of the tests.
"""

import dataclasses
import functools
from collections.abc import Mapping

import gguf
import jax.numpy as jnp
import numpy as np

from algorithms.elements import Integer, SmallFloat
from algorithms.formats import POWERS
from algorithms.tensors import BlockSparseTensor, CompressedTensor, QuantizedTensor, SparseTensor
from experiments.checkpoints.layouts import grids
from kernels import packing

Type = gguf.GGMLQuantizationType
POWERS_DTYPE = jnp.dtype(POWERS)
NUMBERS = {"float16": Type.F16, "bfloat16": Type.BF16, "float32": Type.F32}
FALLBACKS = {"f16": Type.F16, "f32": Type.F32}
E2M1 = SmallFloat(name="e2m1")


@dataclasses.dataclass(frozen=True)
class Plane:
    """Some bits of each code: `width` of them from `shift` on, `lanes` codes side by side.

    A byte holds 8 / width codes that lie `lanes` apart, the first in its lowest bits.
    """

    shift: int
    width: int
    lanes: int

    def pack(self, q: np.ndarray) -> np.ndarray:
        fields = (q >> self.shift & (1 << self.width) - 1).reshape(len(q), -1, *self._cut)
        shifted = fields.astype(np.uint8) << self._shifts
        return np.bitwise_or.reduce(shifted, 2).reshape(len(q), -1)

    def unpack(self, stored: np.ndarray) -> np.ndarray:
        fields = stored.reshape(len(stored), -1, 1, self.lanes) >> self._shifts
        return (fields & (1 << self.width) - 1).reshape(len(stored), -1) << self.shift

    @property
    def _cut(self) -> tuple[int, int]:
        return 8 // self.width, self.lanes

    @property
    def _shifts(self) -> np.ndarray:
        return (np.arange(8 // self.width, dtype=np.uint8) * self.width)[:, None]


SCALE, MINIMUM, INNER = "scale", "minimum", "inner"


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a block lies in its bytes. middle: the code of zero; None where blocks have a minimum."""

    bits: int
    middle: int | None
    parts: tuple[str | Plane, ...]
    inner: int = 0  # bytes of small scales inside a block of 256

    @property
    def size(self) -> int:
        return 256 if self.inner else 32

    def spans(self) -> list[int]:
        """Bytes of each part."""
        named = {SCALE: 2, MINIMUM: 2, INNER: self.inner}
        return [named[p] if isinstance(p, str) else self.size * p.width // 8 for p in self.parts]


NIBBLES = Plane(0, 4, 16)
INTEGERS: Mapping[Type, Kind] = {  # the smallest first
    Type.Q2_K: Kind(2, None, (INNER, Plane(0, 2, 32), SCALE, SCALE), 16),
    Type.Q3_K: Kind(3, 4, (Plane(2, 1, 32), Plane(0, 2, 32), INNER, SCALE), 12),
    Type.Q4_0: Kind(4, 8, (SCALE, NIBBLES)),
    Type.Q4_K: Kind(4, None, (SCALE, SCALE, INNER, Plane(0, 4, 32)), 12),
    Type.Q4_1: Kind(4, None, (SCALE, MINIMUM, NIBBLES)),
    Type.Q5_0: Kind(5, 16, (SCALE, Plane(4, 1, 1), NIBBLES)),
    Type.Q5_K: Kind(5, None, (SCALE, SCALE, INNER, Plane(4, 1, 32), Plane(0, 4, 32)), 12),
    Type.Q5_1: Kind(5, None, (SCALE, MINIMUM, Plane(4, 1, 1), NIBBLES)),
    Type.Q6_K: Kind(6, 32, (Plane(0, 4, 64), Plane(4, 2, 32), INNER, SCALE), 16),
    Type.Q8_0: Kind(8, 128, (SCALE, Plane(0, 8, 1))),
}
SOMETIMES = (Type.Q4_1, Type.Q5_1)  # hold a grid if its minima happen to be exact


def kind_of(tensor: CompressedTensor, fallback: str | None = None) -> Type:
    """The smallest type that holds every tensor of this form exactly; its leaves may be shapes.

    fallback: f16 or f32, the type of what no block holds, dequantized. Raises ValueError, one
    sentence, without one.
    """
    if fitting := _fitting(tensor):
        return fitting[0]
    if isinstance(tensor, SparseTensor | BlockSparseTensor) and str(tensor.dtype) in NUMBERS:
        return NUMBERS[str(tensor.dtype)]  # which has zeros too
    if fallback in FALLBACKS and not tensor.online:
        return FALLBACKS[fallback]
    if tensor.online:
        raise ValueError(
            f"GGUF cannot hold a {type(tensor).__name__}, whose layer changes its input as it "
            "runs: llama.cpp has no such layer; compress without it."
        )
    raise ValueError(
        f"GGUF's blocks cannot hold {_reason(tensor)}: they hold integers of 2 to 8 bits "
        "(asymmetric to 7) with whole zero points, float16 scales and groups of a multiple of 32 "
        "columns, and MXFP4; compress to such a format, or store such tensors dequantized with "
        "fallback=f16 or f32."
    )


def encode(tensor: QuantizedTensor, kind: Type) -> np.ndarray:
    """uint8 [o, bytes]; raises ValueError, one sentence, if the type cannot hold the tensor."""
    if kind not in _fitting(tensor):
        raise ValueError(
            f"{kind.name} cannot hold {_reason(tensor)}: "
            f"{', '.join(k.name for k in _fitting(tensor)) or 'no type'} can."
        )
    o, scale = tensor.shape[0], np.asarray(tensor.scale)
    size = gguf.GGML_QUANT_SIZES[kind][0]
    d = np.repeat(scale, tensor.group_size // size, 1).reshape(-1, 1)
    codes = np.asarray(tensor.codes()).reshape(-1, size)
    if kind == Type.MXFP4:
        return _encode_mxfp4(codes, d).reshape(o, -1)
    zero = np.broadcast_to(np.asarray(tensor.zero_point()), scale.shape)
    zero = np.repeat(zero, tensor.group_size // size, 1).reshape(-1, 1)
    found = INTEGERS[kind]
    if found.middle is not None:  # modulo 256, which makes Q8_0's int8 of it
        codes = codes - zero + np.uint8(0 if kind == Type.Q8_0 else found.middle)
    parts = [
        part.pack(codes) if isinstance(part, Plane) else _table(part, kind, d, zero)
        for part in found.parts
    ]
    return np.concatenate(parts, 1).reshape(o, -1)


def decode(stored: np.ndarray, kind: Type) -> QuantizedTensor:
    """The tensor again, from uint8 [o, bytes]: a grid of the type's bits, groups of one block.

    Raises ValueError, one sentence, for blocks that are no such grid, as other tools' files have.
    """
    if kind != Type.MXFP4 and kind not in INTEGERS:
        raise ValueError(f"{kind.name} holds no grid of planish's: read it as a dense tensor.")
    size, width = gguf.GGML_QUANT_SIZES[kind]
    o, blocks = len(stored), stored.reshape(-1, width)
    if kind == Type.MXFP4:
        codes, scale = NIBBLES.unpack(blocks[:, 1:]), blocks[:, :1].view(POWERS_DTYPE)
        return _tensor(codes.reshape(o, -1), scale.reshape(o, -1), None, E2M1, size)
    found = INTEGERS[kind]
    cuts = np.split(blocks, np.cumsum(found.spans())[:-1], 1)
    cut = [(part, np.ascontiguousarray(x)) for part, x in zip(found.parts, cuts, strict=True)]
    codes = functools.reduce(
        np.bitwise_or, [part.unpack(x) for part, x in cut if isinstance(part, Plane)]
    )
    d = next(x.view(np.float16) for part, x in cut if part == SCALE)
    if found.middle is None:
        zero = _zero_points(cut, kind, d).reshape(o, -1)
        element = Integer(bits=found.bits)
    else:
        codes = codes ^ np.uint8(128) if kind == Type.Q8_0 else codes
        zero, element = None, Integer(bits=found.bits, symmetric=True)
    for part, x in cut:
        z = np.zeros_like(d, np.uint8) if zero is None else zero.reshape(-1, 1)
        if isinstance(part, str) and not np.array_equal(x, _table(part, kind, d, z)):
            raise ValueError(
                f"The {kind.name} blocks have scales or minima of their own inside: planish reads "
                "such a tensor as a dense one."
            )
    return _tensor(codes.reshape(o, -1), d.reshape(o, -1), zero, element, size)


def _reason(tensor: CompressedTensor) -> str:
    """What keeps a tensor from a block."""
    reason = grids.unfit(tensor, range(2, 9))
    if reason is not None or not isinstance(tensor, QuantizedTensor):
        return str(reason)
    if tensor.group_size % 32 or tensor.columns % tensor.group_size:
        return f"groups of {tensor.group_size} of {tensor.columns} columns"
    kind = "symmetric" if tensor.zero is None else "asymmetric"
    return f"{kind} grids of {tensor.bits} bits in groups of {tensor.group_size}"


def _is_mxfp4(tensor: CompressedTensor) -> bool:
    if not isinstance(tensor, QuantizedTensor) or tensor.element != E2M1:
        return False
    groups = tensor.block[0] == 1 and tensor.group_size % 32 == 0 and tensor.divisor is None
    return groups and tensor.columns % tensor.group_size == 0 and tensor.scale.dtype == POWERS_DTYPE


def _fitting(tensor: CompressedTensor) -> list[Type]:
    """Every type that may hold this form: those that always do first, then the smallest."""
    if _is_mxfp4(tensor):
        return [Type.MXFP4]
    if grids.unfit(tensor, range(2, 9)) is not None or not isinstance(tensor, QuantizedTensor):
        return []
    if tensor.columns % tensor.group_size:
        return []
    bits, whole = tensor.bits, tensor.zero is None
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if whole else (1 - 2**bits, 2**bits - 1)
    found = [
        kind
        for kind, k in INTEGERS.items()
        if tensor.group_size % k.size == 0
        and (bits <= k.bits if k.middle is None else -k.middle <= low and high < k.middle)
    ]
    surely = any(kind not in SOMETIMES for kind in found)
    return sorted(found, key=lambda kind: kind in SOMETIMES) if surely else []


def _table(part: str, kind: Type, d: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """The bytes of a named part for blocks of scale d and zero point `zero`, both [n, 1]."""
    if part == SCALE:
        return np.ascontiguousarray(d, np.float16).view(np.uint8)
    if part == INNER:
        return _inner(kind, zero)
    exact = -zero.astype(np.float32) * d.astype(np.float32)
    minimum = np.where(zero == 0, np.float32(0), exact).astype(np.float16)  # not -0
    if not np.array_equal(minimum.astype(np.float32), exact):
        raise ValueError(
            f"{kind.name} cannot hold the minima -scale·zero of this tensor, which are not exact "
            "in float16: choose Q5_0 for 4 bits, or Q8_0."
        )
    return minimum.view(np.uint8)


def _inner(kind: Type, zero: np.ndarray) -> np.ndarray:
    """Small scales that are all 1 and, where a block has minima, all `zero`."""
    n, one = len(zero), np.ones_like(zero)
    if kind == Type.Q2_K:  # 4 bits each
        return np.repeat(one | zero << 4, 16, 1)
    if kind == Type.Q3_K:  # 33 of 6 bits, less 32: the low four bits of all, then the high two
        return np.broadcast_to(np.array([0x11] * 8 + [0xAA] * 4, np.uint8), (n, 12))
    if kind == Type.Q6_K:
        return np.ones((n, 16), np.uint8)
    # Q4_K, Q5_K: eight scales and eight minima of 6 bits; the last four of each are cut in two.
    parts = (one, zero | zero >> 4 << 6, one | (zero & 15) << 4)
    return np.concatenate([np.repeat(part, 4, 1) for part in parts], 1)


def _zero_points(cut: list, kind: Type, d: np.ndarray) -> np.ndarray:
    """What the minima stand for, to be compared with what is stored."""
    named = {part: x for part, x in cut if isinstance(part, str)}
    if INNER in named:
        inner = named[INNER]
        return inner[:, :1] >> 4 if kind == Type.Q2_K else inner[:, 4:5] & 63
    minimum, step = (x.astype(np.float32) for x in (named[MINIMUM].view(np.float16), d))
    with np.errstate(all="ignore"):  # scales of zero, and damaged ones
        steps = np.nan_to_num(-minimum / step, nan=0.0, posinf=0.0, neginf=0.0)
    return np.clip(np.rint(steps), 0, 2 ** INTEGERS[kind].bits - 1).astype(np.uint8)


def _encode_mxfp4(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    powers = scale.view(np.uint8)
    if (powers < 2).any() or (powers == 255).any():
        raise ValueError(
            "MXFP4 cannot hold scales below 2^-125 or NaN exactly: the weights are damaged, or "
            "far too small."
        )
    return np.concatenate([powers, NIBBLES.pack(codes)], 1)


def _tensor(codes, scale, zero, element, size) -> QuantizedTensor:
    tensor = QuantizedTensor(
        packed=packing.pack(jnp.asarray(codes), element.bits),
        scale=jnp.asarray(scale),
        zero=None if zero is None else jnp.asarray(zero),
        divisor=None,
        element=element,
        columns=codes.shape[1],
        block=(1, size),
    )
    tensor.validate()
    return tensor
