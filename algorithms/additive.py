"""Weights as sums of entries of several codebooks: how to fit them to a layer's output.

A group of c consecutive weights of a row is ŵ_g = s Σ_m C_m[b_gm]. For G = X Xᵀ, each function here
lowers J = tr((W - Ŵ) G (W - Ŵ)ᵀ) in one of C, s and b, the others held fixed. It is the arithmetic
of additive quantization (Babenko, Lempitsky, CVPR 2014) as AQLM has it: papers/aqlm.md.

Arrays are transposed: the rows of W run along the last axis. Letters: o rows (outputs), g groups of
a row, c weights of a group, i = g c inputs, m codebooks, k entries of each, b beams.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from algorithms import clustering

_TABLE = 2**24  # costs of candidates at a time: 64 MB of float32


class Encoding(NamedTuple):
    """Ŵ in its parts."""

    codes: Int[Array, "g m o"]
    codebooks: Float[Array, "m k c"]
    scale: Float[Array, " o"]


def fit_codebooks(
    target: Float[Array, "g c o"], gram: Float[Array, "i i"], encoding: Encoding, steps: int
) -> Encoding:
    """Lower J by `steps` of conjugate gradients in all codebooks at once, from where they are.

    The preconditioner is the diagonal of the quadratic form without what ties groups together. An
    entry that no code names has no gradient, and stays.
    """
    codes, codebooks, scale = encoding
    k, squares = codebooks.shape[1], jnp.diag(gram).reshape(*target.shape[:2], 1) * scale**2
    inverse = _divide(1.0, _gather(squares, codes, k))
    error = target - scale * decode(codebooks, codes)
    r = _gather(scale * _times(gram, error), codes, k)
    start = jnp.sum(r * inverse * r)
    first: Any = (codebooks, r, inverse * r, start)

    def step(state, _):
        x, r, p, size = state
        q = _gather(scale * _times(gram, scale * decode(p, codes)), codes, k)
        # Codebooks may be shifted against each other, so the form is singular: once what is left to
        # gain is a rounding error, a step would only follow that.
        alpha = jnp.where(size > jnp.finfo(r.dtype).eps * start, _divide(size, jnp.sum(p * q)), 0)
        r = r - alpha * q
        following = jnp.sum(r * inverse * r)
        return (x + alpha * p, r, inverse * r + _divide(following, size) * p, following), None

    (codebooks, *_), _ = lax.scan(step, first, length=steps)
    return encoding._replace(codebooks=codebooks)


def fit_scales(
    target: Float[Array, "g c o"], gram: Float[Array, "i i"], encoding: Encoding
) -> Encoding:
    """The scale of each row that minimises its part of J; a row that does nothing keeps its own."""
    u = decode(encoding.codebooks, encoding.codes)
    pull = _times(gram, u)
    along, size = jnp.sum(target * pull, (0, 1)), jnp.sum(u * pull, (0, 1))
    return encoding._replace(scale=jnp.where(size > 0, _divide(along, size), encoding.scale))


def stored(encoding: Encoding) -> Encoding:
    """Codebooks and scales as float16 holds them, in the type they came in."""
    largest = float(jnp.finfo(jnp.float16).max)

    def rounded(x):
        return jnp.clip(x, -largest, largest).astype(jnp.float16).astype(x.dtype)

    return Encoding(encoding.codes, rounded(encoding.codebooks), rounded(encoding.scale))


def search_codes(
    target: Float[Array, "g c o"],
    gram: Float[Array, "i i"],
    encoding: Encoding,
    order: Int[Array, " g"],
    beam: int,
) -> tuple[Encoding, Float[Array, " o"]]:
    """Beam search for each row's codes: over its groups in `order`, in each over the codebooks.

    Starting from the encoding's own codes, J of a row never rises. Gives J by row, too. Rows are
    independent, and go some at a time.
    """
    (g, _, o), (m, k, _) = target.shape, encoding.codebooks.shape
    chunk = min(o, max(1, _TABLE // (beam * k)))

    def chunks(x):  # rows last -> [chunks, ..., chunk]; rows that are missing are zeros
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -o % chunk)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, chunk), -2, 0)

    def search(part):
        rows, codes, scale = part
        return _search_rows(
            rows, gram, Encoding(codes, encoding.codebooks, scale), order=order, beam=beam
        )

    codes, losses = lax.map(search, [chunks(x) for x in (target, encoding.codes, encoding.scale)])
    codes = jnp.moveaxis(codes, 0, -2).reshape(g, m, -1)[..., :o]
    return encoding._replace(codes=codes), losses.reshape(-1)[:o]


def _search_rows(target, gram, encoding, *, order, beam):
    """The search for some rows. Beams lead: codes [b, g, m, o], errors [b, g, c, o], J [b, o]."""
    (g, c, o), (codes, tables, scale) = target.shape, encoding
    error = target - scale * decode(tables, codes)
    one = jnp.sum(error * _times(gram, error), (0, 1))
    losses = jnp.where(jnp.arange(beam)[:, None] == 0, one[None], jnp.inf)

    def search_group(state, n):
        codes, error, losses = state
        rows = lax.dynamic_slice_in_dim(gram, n * c, c)
        own = lax.dynamic_slice_in_dim(rows, n * c, c, axis=1)
        pull = jnp.einsum("ci,bio->bco", rows, error.reshape(beam, g * c, o))
        group = (codes[:, n], pull, losses, jnp.broadcast_to(jnp.arange(beam)[:, None], (beam, o)))
        step = functools.partial(_search_codebook, own=own, scale=scale)
        (chosen, _, losses, parent), _ = lax.scan(step, group, (tables, jnp.arange(len(tables))))
        codes, error = _follow(codes, parent), _follow(error, parent)
        here = jax.vmap(lambda code: target[n] - scale * decode(tables, code[None])[0])(chosen)
        return (codes.at[:, n].set(chosen), error.at[:, n].set(here), losses), None

    beams: Any = (*(jnp.repeat(x[None], beam, 0) for x in (codes, error)), losses)
    (codes, _, losses), _ = lax.scan(search_group, beams, order)
    return codes[0], losses[0]  # the least comes first


def _search_codebook(group, codebook, *, own, scale):
    """Replace one codebook's code of one group by the best few, over all beams of a row.

    With t the pull of what the others leave, G_g,: (W - Ŵ + s C[old])ᵀ, the entry C[k] adds
    s² C[k]ᵀ G_gg C[k] - 2 s C[k]ᵀ t to J: for all k at once the product of [C, diag(C G_gg Cᵀ)]
    with [-2 s t; s²].
    """
    (chosen, pull, losses, parent), (table, m) = group, codebook
    beam, _, o = pull.shape
    norms = jnp.sum(table @ own * table, 1)
    old = chosen[:, m]  # [b, o]
    was = table[old].swapaxes(1, 2)
    free = pull + scale * (own @ was)
    before = scale**2 * norms[old] - 2 * scale * jnp.sum(was * free, 1)
    columns = jnp.concatenate(
        [-2 * scale * free, jnp.broadcast_to(scale**2, (beam, 1, o)).astype(free.dtype)], 1
    )
    costs = jnp.concatenate([table, norms[:, None]], 1) @ columns  # [b, k, o]
    found, code = jax.vmap(lambda cost: least_few(cost, beam))(costs)  # [b, few, o]
    total = (losses - before)[:, None] + found
    best = jnp.argsort(total.reshape(-1, o), 0)[:beam]
    source = best // beam
    code = jnp.take_along_axis(code.reshape(-1, o), best, 0)
    losses = jnp.take_along_axis(total.reshape(-1, o), best, 0)
    pull = _follow(free, source) - scale * (own @ table[code].swapaxes(1, 2))
    chosen = _follow(chosen, source).at[:, m].set(code)
    return (chosen, pull, losses, _follow(parent, source)), None


def least_few(
    costs: Float[Array, "k o"], few: int
) -> tuple[Float[Array, "few o"], Int[Array, "few o"]]:
    """The least entries of each column, from the least up, and where they are; `costs` as for
    `clustering.first_least`, which finds one.
    """
    if few == 1:
        at = clustering.first_least(costs)[None]
        return jnp.take_along_axis(costs, at, 0), at
    rows, last = lax.broadcasted_iota(jnp.int32, costs.shape, 0), len(costs) - 1

    def take(before, _):
        least, at = before  # the next one is greater, or equal and further on
        left = (costs > least) | ((costs == least) & (rows > at))
        least = jnp.min(jnp.where(left, costs, jnp.inf), 0, keepdims=True)
        at = jnp.min(jnp.where(left & (costs == least), rows, last), 0, keepdims=True)
        return (least, at), (least[0], at[0])

    first = (jnp.full_like(costs[:1], -jnp.inf), jnp.full_like(rows[:1], -1))
    return lax.scan(take, first, length=few)[1]


def _follow(x: Array, source: Int[Array, "b o"]) -> Array:
    """x [b, ..., o], in each row of W the beams that `source` names; selects, not a slow gather."""
    if len(source) == 1:
        return x
    index = source.reshape(len(source), *[1] * (x.ndim - 2), -1)
    start = jnp.broadcast_to(x[:1], x.shape)
    return lax.fori_loop(1, len(x), lambda b, y: jnp.where(index == b, x[b][None], y), start)


def decode(codebooks: Float[Array, "m k c"], codes: Int[Array, "g m o"]) -> Float[Array, "g c o"]:
    """Σ_m C_m[b_gm], without the scale."""
    entries = jax.vmap(lambda table, code: table[code], (0, 1))(codebooks, codes)
    return entries.sum(0).swapaxes(1, 2)


def _gather(x: Float[Array, "g c o"], codes: Int[Array, "g m o"], k: int) -> Float[Array, "m k c"]:
    """The transpose of `decode`: for each entry, the sum of x over the groups that name it."""
    groups = x.swapaxes(1, 2).reshape(-1, x.shape[1])
    return jax.vmap(lambda code: jax.ops.segment_sum(groups, code.reshape(-1), k), 1)(codes)


def _divide(a, b):
    """a / b, and zero where b is not positive."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _times(gram: Float[Array, "i i"], x: Float[Array, "g c o"]) -> Float[Array, "g c o"]:
    return (gram @ x.reshape(len(gram), -1)).reshape(x.shape)


def loss(
    target: Float[Array, "g c o"], gram: Float[Array, "i i"], encoding: Encoding
) -> Float[Array, " o"]:
    """J by row of W."""
    error = target - encoding.scale * decode(encoding.codebooks, encoding.codes)
    return jnp.sum(error * _times(gram, error), (0, 1))
