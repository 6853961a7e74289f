"""Words of packed codes in a warpgroup's registers, and what wgmma reads out of them.

A thread takes whole words of 32 bits: one, or three for codes of 3 bits, so that none is cut. Four
threads share a row. wgmma wants two bfloat16 to a register, side by side in a row; which columns of
W those are is up to us, as long as x has its columns in the same order (`Order`). So each thread
decodes what it loaded, and hands nothing to another.

`operand`, `shared`, `parts` and `permute_bytes` say which register is which: Mosaic code on a GPU,
and their meaning in jnp when interpreted. All else is arithmetic on arrays.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

ROWS = 64  # of W that a warpgroup multiplies: wgmma's M
THREADS = 4  # of a row


class Order(NamedTuple):
    """Which codes a thread takes, and in which pairs.

    Of c codes, pair p is p and p + c / 2, which the halves of a word decode at once; or, where
    they are looked up, 2 p and 2 p + 1.
    """

    bits: int
    adjacent: bool = False

    @property
    def words(self) -> int:
        """That a thread takes together."""
        return 3 if self.bits == 3 else 1

    @property
    def codes(self) -> int:
        """In those words."""
        return self.words * 32 // self.bits

    @property
    def columns(self) -> int:
        """Of a row's threads, side by side."""
        return self.codes * THREADS

    def of(self, x: jax.Array) -> jax.Array:
        """x's columns [m, i] in the order that `operand` gives W's."""
        m, i = x.shape
        pair, axes = (self.codes // 2, 2), (0, 1, 3, 2, 4)
        if not self.adjacent:
            pair, axes = (2, self.codes // 2), (0, 1, 4, 2, 3)
        columns = x.reshape(m, i // self.columns, THREADS, *pair)
        return columns.transpose(axes).reshape(m, i)


def _layout(width: int, each: int = 1) -> Any:
    """Of a table [64, n], `width` columns at a time lie in a row's threads: each takes `each` of
    them, or, where they are fewer than threads, neighbours take the same one.
    """
    threads = width // each
    replicated = [fragmented_array.Replicated(THREADS // threads)] if threads < THREADS else []
    columns = [-3, *replicated] if threads > 1 else replicated
    tiling = fragmented_array.Tiling(((64, width), (16, width), (8, width), (each,), (1,)))
    layout = fragmented_array.TiledLayout(
        tiling, warp_dims=(-8,), lane_dims=(-4, *columns), vector_dim=-1, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


WORDS = _layout(THREADS)


def load(words: Any, order: Order) -> jax.Array:
    """A tile of words [64, w] from shared memory."""
    if order.words == 1:
        return plgpu.load(words, layout=WORDS)
    layout = _layout(THREADS * order.words, order.words)
    return plgpu.load(words, layout=layout, optimized=False)


def parts(words: jax.Array, order: Order, interpret: bool) -> list[jax.Array]:
    """The first, second, … word of each thread: [64, w / order.words] each."""
    rows, count = words.shape
    each, shape = order.words, (rows, count // order.words)
    if each == 1:
        return [words]
    if interpret:
        return [words[:, part::each] for part in range(each)]

    @plgpu.inline_mgpu(
        arg_types=(_layout(THREADS * each, each),),
        return_type=[plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=WORDS)] * each,
    )
    def relabel(_, words):
        found = parts_of(words.registers, each)
        return [_array(part, shape, WORDS.to_mgpu(), False) for part in found]

    return relabel(words)


def operand(pairs: list[jax.Array], interpret: bool) -> jax.Array:
    """Pair p of every thread's codes, for each p: [64, t] words of two bfloat16, as wgmma's operand
    [64, 2 t len(pairs)].
    """
    rows, threads = pairs[0].shape
    count, shape = len(pairs), (rows, 2 * threads * len(pairs))
    if interpret:
        columns = jnp.stack([pair.reshape(rows, -1, THREADS) for pair in pairs], 2)
        return jax.lax.bitcast_convert_type(columns, jnp.bfloat16).reshape(shape)

    @plgpu.inline_mgpu(
        arg_types=(WORDS,) * count,
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def relabel(_, *pairs):
        two = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = side_by_side([pair.registers for pair in pairs])
        return _array(_each(lambda word: utils.bitcast(word, two), registers), shape)

    return relabel(*pairs)


def load_shared(table: Any, codes: int, order: Order) -> jax.Array:
    """Columns of a table [64, n] in memory, each of which `codes` codes share, for `shared`."""
    width = max(THREADS * order.codes // codes, 1)
    return plgpu.load(table, layout=_layout(width), optimized=False)


def shared(table: jax.Array, codes: int, order: Order, columns: int, interpret: bool) -> jax.Array:
    """What `load_shared` gave, in bfloat16, beside each code of an operand [64, columns]."""
    shape, pairs = (table.shape[0], columns), order.codes // 2
    if interpret:
        threads = jnp.repeat(table, max(columns // table.shape[1] // order.codes, 1), 1)
        beside = threads.reshape(shape[0], -1, 1, THREADS, 1)
        return jnp.broadcast_to(beside, (*beside.shape[:2], pairs, THREADS, 2)).reshape(shape)

    @plgpu.inline_mgpu(
        arg_types=(_layout(max(THREADS * order.codes // codes, 1)),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def relabel(_, table):
        twice = _each(lambda one: utils.vector_concat([one, one]), table.registers)
        return _array(repeated(twice, columns // 8), shape)

    return relabel(table)


def permute_bytes(a: Any, b: Any, selectors: Any, interpret: bool) -> jax.Array:
    """Four of the bytes 0 to 3 of a and 4 to 7 of b: those that the low four hexadecimal digits of
    selectors name, below 8 each. Arrays [64, t] of words, or numbers.
    """
    given = [value for value in (a, b, selectors) if not isinstance(value, int)]
    if interpret:
        a, b, selectors = (jnp.asarray(value, jnp.uint32) for value in (a, b, selectors))
        chosen = jnp.uint32(0)
        for n in range(4):
            digit = selectors >> (4 * n) & 7
            byte = jnp.where(digit < 4, a, b) >> (digit % 4 * 8) & 0xFF
            chosen |= byte << (8 * n)
        return chosen

    @plgpu.inline_mgpu(
        arg_types=(WORDS,) * len(given),
        return_type=plgpu.ShapeDtypeStruct(given[0].shape, jnp.uint32, layout=WORDS),
    )
    def permute(_, *given):
        word, kind = ir.IntegerType.get_signless(32), given[0].registers.flat[0].type
        arrays = iter(given)
        numbers = [value if isinstance(value, int) else next(arrays) for value in (a, b, selectors)]

        def one(*registers):
            rest = iter(registers)
            values = [mgpu.c(number, word) if isinstance(number, int)
                      else utils.bitcast(next(rest), word) for number in numbers]  # fmt: skip
            return utils.bitcast(utils.prmt(*values), kind)

        registers = _each(one, *(array.registers for array in given))
        return _array(registers, given[0].shape, WORDS.to_mgpu(), False)

    return permute(*given)


# Which register is which, on arrays of registers as the layouts order them: by columns, then the
# two halves of a warp's sixteen rows.


def parts_of(registers: Any, each: int) -> list[Any]:
    """Of threads' `each` words: all first ones, all second ones, …"""
    return [registers.reshape(-1, 2, each)[:, :, part] for part in range(each)]


def side_by_side(pairs: list[Any]) -> Any:
    """Every thread's pairs, one beside another."""
    count = len(pairs)
    registers = pairs[0].repeat(count).reshape(-1, count, 2)  # as many; each is set below
    for p, pair in enumerate(pairs):
        registers[:, p] = pair.reshape(-1, 2)
    return registers


def repeated(table: Any, times: int) -> Any:
    """A table's registers, beside each of `times` blocks of an operand's columns."""
    table = table.reshape(-1, 2)
    return table.repeat(times // table.shape[0], axis=0)


def _each(f: Any, *registers: Any) -> Any:
    found = registers[0].copy()
    for index in range(found.size):
        found.flat[index] = f(*(array.flat[index] for array in registers))
    return found


def _array(registers, shape, layout=mgpu.WGMMA_LAYOUT, signed=None):
    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)
