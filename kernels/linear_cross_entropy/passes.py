"""The two kernels that tiles of logits make: sums over the vocabulary for each token, and a value
for each entry, as a bfloat16 [tokens, entries].

layers: (h, w), one or more, of the same tokens and vocabulary. per_token: arrays [tokens], whose
values a warpgroup loads where an item starts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.linear_cross_entropy import tiles
from kernels.linear_cross_entropy.tiles import ROWS, WARPGROUPS, Schedule

type Layers = Sequence[tuple[Any, Any]]


def totals(
    name: str,
    layers: Layers,
    per_token: Sequence[Any],
    plan: Schedule,
    initial: Sequence[float],
    use: Callable[..., Any],
    interpret: bool,
) -> list[Any]:
    """[ranges, tokens] of what each of `initial` came to over a range of the vocabulary.

    use(state, per_token, logits, column) is the state after a tile.
    """
    per_token = _padded(per_token, plan)

    def body(*refs):
        weights, values, outs = _split(refs, layers, per_token)

        def scoped(buffers):
            def begin(row):
                constants = [plgpu.load(x.at[pl.ds(row, ROWS)], layout=tiles.ROW, optimized=False)
                             for x in values]  # fmt: skip
                return [tiles.constant(value) for value in initial], constants

            def step(state, logits, row, column):
                return use(state[0], state[1], logits, column), state[1]

            def finish(state, row, part):
                mine = buffers.at[lax.axis_index("warpgroup")]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for n, value in enumerate(state[0]):
                    mine[n] = value
                plgpu.commit_smem()
                for n, out in enumerate(outs):
                    plgpu.copy_smem_to_gmem(mine.at[n], out.at[part, pl.ds(row, ROWS)])

            stages = tiles.stages(plan.width, reserved=4 * WARPGROUPS * len(outs) * ROWS)
            tiles.each_tile(weights, plan, begin, step, finish, stages=stages)
            plgpu.wait_smem_to_gmem(0)

        buffers = plgpu.SMEM((WARPGROUPS, len(outs), ROWS), jnp.float32)
        pl.run_scoped(scoped, buffers, collective_axes="warpgroup")

    tokens = layers[0][0].shape[0]
    out = jax.ShapeDtypeStruct((plan.ranges, plan.groups * tiles.TOKENS), jnp.float32)
    arguments = [x for layer in layers for x in layer] + per_token
    found = tiles.kernel(name, body, plan, (out,) * len(initial), interpret)(*arguments)
    return [x[:, :tokens] for x in found]


def each_entry(
    name: str,
    layers: Layers,
    per_token: Sequence[Any],
    plan: Schedule,
    part: Callable[..., Any],
    start: Any,
    size: int,
    interpret: bool,
) -> jax.Array:
    """part(logits, per_token, entries) for `size` entries of the vocabulary, from `start` on, a
    multiple of 8.

    It is called with a few columns of a tile at once, and with the number of each one's entry. What
    it is given and gives has their shape.
    """
    per_token = _padded(per_token, plan)
    at_once = 64 if plan.width % 64 == 0 else 32  # columns
    buffers = plgpu.SMEM(
        (WARPGROUPS, 2, ROWS, at_once), jnp.bfloat16, transforms=tiles.swizzled(at_once)
    )

    def body(*refs):
        weights, (*values, start), (out,) = _split(refs, layers, [*per_token, None])
        start = start[0]

        def scoped(buffers):
            def begin(row):
                return [plgpu.load(x.at[pl.ds(row, ROWS)], layout=tiles.ROW, optimized=False)
                        for x in values]  # fmt: skip

            def use(constants, logits, row, column):
                mine = buffers.at[lax.axis_index("warpgroup")]
                # Piece after piece, so that a tile's registers are free again once they were read.
                for first in range(0, plan.width, at_once):
                    pieces = [x[:, first : first + at_once] for x in logits]
                    shape = pieces[0].shape
                    entries = tiles.columns(shape, start + column + first)
                    made = part(pieces, [tiles.across(x, shape) for x in constants], entries)
                    buffer = mine.at[first // at_once % 2]
                    # Of the tile before, all copies were done long ago: its pieces may be odd.
                    plgpu.wait_smem_to_gmem(min(first, 1), wait_read_only=True)
                    buffer[...] = made.astype(out.dtype)
                    plgpu.commit_smem()
                    at = out.at[pl.ds(row, ROWS), pl.ds(column + first, at_once)]
                    plgpu.copy_smem_to_gmem(buffer, at)  # but what lies outside of it
                return constants

            stages = tiles.stages(plan.width, reserved=WARPGROUPS * 2 * ROWS * at_once * 2)
            tiles.each_tile(weights, plan, begin, use, lambda *_: None, stages=stages, start=start)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, buffers, collective_axes="warpgroup")

    tokens = layers[0][0].shape[0]
    out = jax.ShapeDtypeStruct((tokens, -(-size // 8) * 8), jnp.bfloat16)  # rows of whole 16 bytes
    arguments = [x for layer in layers for x in layer] + per_token + [jnp.int32(start).reshape(1)]
    return tiles.kernel(name, body, plan, out, interpret)(*arguments)[:, :size]


def _padded(per_token, plan: Schedule) -> list[Any]:
    """With zeros for the tokens that complete a group."""
    width = plan.groups * tiles.TOKENS
    return [jnp.pad(x, (0, width - x.shape[0])) for x in per_token]


def _split(refs, layers, per_token):
    """A kernel's references: of layers, of values per token, and of what it writes."""
    weights, values = 2 * len(layers), 2 * len(layers) + len(per_token)
    pairs = list(zip(refs[:weights:2], refs[1:weights:2], strict=True))
    return pairs, refs[weights:values], refs[values:]
