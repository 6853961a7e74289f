"""What a code stands for before its scale: an integer, FP4 or NF4; in jnp and in registers.

FP4 is E2M1 of the OCP Microscaling specification, NF4 that of QLoRA (arXiv:2305.14314), with
bitsandbytes' numbers. `algorithms.minifloat` has both too, and a test compares them.
"""

import functools
import struct

import jax
import jax.numpy as jnp

from kernels.wna16_matmul import registers
from kernels.wna16_matmul.registers import Order

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = {
    "fp4": (*FP4, *(-level for level in FP4)),
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
}
KINDS = ("int", *LEVELS)


def decode(codes: jax.Array, kind: str, dtype) -> jax.Array:
    """The numbers before zero point and scale, in dtype."""
    if kind == "int":
        return codes.astype(dtype)
    return jnp.asarray(LEVELS[kind], dtype)[codes]


def order(kind: str, bits: int) -> Order:
    """In which codes lie in registers."""
    return Order(bits, adjacent=kind == "nf4")


def decode_words(words: jax.Array, kind: str, order: Order, interpret: bool) -> jax.Array:
    """Words [64, w] as wgmma's operand in bfloat16, without scale; integers less 2^(bits-1)."""
    parts = registers.parts(words, order, interpret)
    if kind == "nf4":
        return registers.operand(_looked_up(parts[0], LEVELS[kind], interpret), interpret)
    if kind == "fp4":
        return _fp4(parts[0], interpret)
    if order.bits == 8:
        return _bytes(parts[0], interpret)
    fields = _fields_of_3(parts) if order.bits == 3 else _fields(parts[0], order.bits)
    # 0x4300 is 128, whose last bit counts ones: the code there is 128 + code, exactly.
    pairs = [field | jnp.uint32(0x43004300) for field in fields]
    return registers.operand(pairs, interpret) - jnp.bfloat16(128 + 2 ** (order.bits - 1))


def _fields(word, bits):
    """The codes of both halves of a word, each in the low bits of its half."""
    mask = jnp.uint32((2**bits - 1) * 0x10001)
    return [word >> jnp.uint32(bits * p) & mask for p in range(16 // bits)]


def _fields_of_3(parts):
    """Those of three words, whose halves hold 16 codes each, after bringing the halves together."""
    first, second, third = parts
    low, high = jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000)
    half = jnp.uint32(16)
    joined = (first & low | second & high, first >> half | third << half,
              second & low | third & high)  # fmt: skip
    mask = jnp.uint32(0x70007)
    fields = []
    for p in range(16):
        at, shift = divmod(3 * p, 16)
        field = joined[at] >> jnp.uint32(shift)
        if shift > 13:  # the last 16 - shift bits are here, the others in the next
            kept = (1 << (16 - shift)) - 1
            rest = joined[at + 1] << jnp.uint32(16 - shift)
            field = field & jnp.uint32(kept * 0x10001) | rest & jnp.uint32((7 - kept) * 0x10001)
            fields.append(field)
        else:
            fields.append(field & mask)
    return fields


def _bytes(word, interpret):
    """code - 128. A byte's first bit would fall into the exponent of 128 + code, where it doubles
    what the other seven count from: 128 + rest, or 256 + rest. So they are taken apart.
    """
    pairs = [word & jnp.uint32(0x00FF00FF), word >> jnp.uint32(8) & jnp.uint32(0x00FF00FF)]
    magic, first = jnp.uint32(0x43004300), jnp.uint32(0x00800080)
    rest = [pair & jnp.uint32(0x007F007F) | magic for pair in pairs]  # 128 + rest
    less = [
        (pair ^ first) & first | magic for pair in pairs
    ]  # 128 where the first bit is 1, or 256
    return registers.operand(rest, interpret) - registers.operand(less, interpret)


def _fp4(word, interpret):
    """Sign, exponent and mantissa where bfloat16 has them: a number 2^126 times too small."""
    pairs = []
    for p in range(4):
        sign, rest = word << jnp.uint32(12 - 4 * p), 6 - 4 * p
        rest = word << jnp.uint32(rest) if rest > 0 else word >> jnp.uint32(-rest)
        pairs.append(sign & jnp.uint32(0x80008000) | rest & jnp.uint32(0x01C001C0))
    small = registers.operand(pairs, interpret)
    raised = small * jnp.bfloat16(2.0**126)
    if interpret:  # XLA on a CPU takes 0.5, then a denormal, for zero
        bits = jax.lax.bitcast_convert_type(small, jnp.uint16)
        half = jnp.where(bits >> 15 == 1, jnp.bfloat16(-0.5), jnp.bfloat16(0.5))
        raised = jnp.where(bits & 0x7FFF == 0x40, half, raised)
    return raised


def _looked_up(word, levels, interpret):
    """Levels in bfloat16, four codes at a time, by the low and the high byte."""
    three = word & jnp.uint32(0x77777777)  # bits of a code: which of eight bytes
    fourth = (word & jnp.uint32(0x88888888)) >> jnp.uint32(1) | jnp.uint32(0x32103210)
    choose = functools.partial(registers.permute_bytes, interpret=interpret)
    pairs = []
    for half in (0, 16):
        at, blend = (digits >> jnp.uint32(half) for digits in (three, fourth))
        low, high = (
            choose(choose(a, b, at), choose(c, d, at), blend) for a, b, c, d in _byte_tables(levels)
        )
        pairs += [choose(low, high, digits) for digits in (0x5140, 0x7362)]
    return pairs


def _byte_tables(levels):
    """The low and the high bytes of sixteen levels in bfloat16, as four words each."""
    bits = [_bfloat16(level) for level in levels]
    return [
        [sum((b >> shift & 0xFF) << 8 * n for n, b in enumerate(bits[k : k + 4]))
         for k in range(0, 16, 4)]
        for shift in (0, 8)
    ]  # fmt: skip


def _bfloat16(value: float) -> int:
    """The bits of the nearest bfloat16, ties to even."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16
