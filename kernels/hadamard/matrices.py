"""Hadamard matrices: H of ±1 with H Hᵀ = n I, from the constructions below.

Sylvester: order 2^k, H_ij = (-1)^(number of ones that i and j share).
Paley I: order q + 1, q ≡ 3 mod 4 a prime power. Paley II: order 2 (q + 1), q ≡ 1 mod 4. Both from
the matrix Q_ab = χ(a - b) over GF(q), χ = 1 for squares, -1 for others, 0 for zero.
Goethals and Seidel: order 4 n from four circulants with A Aᵀ + B Bᵀ + C Cᵀ + D Dᵀ = 4 n I. Those
stored are, for n = 23, 29 and 43, the symmetric ones in Hall's "Combinatorial Theory" (1983); for
n = 39 those of London's thesis (2013); for n = 47 sums of the T-sequences in Cohen et al.
(1989). All were read in SageMath, src/sage/combinat, and are checked by H Hᵀ = n I.
Kronecker products of all these. The smallest orders left out: 236, 260, 268, 292.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int8

Rows = list[list[int]]

CIRCULANTS = {  # n: a line of each of A, B, C, D
    23: (
        "++---+---+-++-+---+---+",
        "+-++-++--++++++--++-++-",
        "+++---++-+-++-+-++---++",
        "+++-+++-+------+-+++-++",
    ),
    29: (
        "+++---++--+-+----+-+--++---++",
        "+-+---++--+-++++++-+--++---+-",
        "++++-++-+---++++++---+-++-+++",
        "++--+--+-+++-++++-+++-+--+--+",
    ),
    39: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    43: (
        "++---++++-+--+--++--------++--+--+-++++---+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
    ),
    47: (
        "+---+-+----++++++--+---+++--+-++-+-+++-+--+---+",
        "+--+--+-+++-----+---+------+++--++-++++-++++-+-",
        "+---+-+----++++++--+---+--++-+--+-+---+-++-+++-",
        "+--+--+-+++-----+---+---+++---++--+----+----+-+",
    ),
}


@functools.cache
def factor(n: int) -> tuple[int, int]:
    """(m, 2^k) with n = m 2^k and m the smallest order that has a matrix without doubling.

    Raises ValueError where no construction reaches n.
    """
    found = _factor(n)
    if found is None:
        raise ValueError(
            f"n={n} has no Hadamard matrix here (orders are 1, 2 and most multiples of 4): rotate "
            f"in blocks of {largest_block(n)}, the largest size with one that divides it."
        )
    return found


@functools.cache
def largest_block(n: int) -> int:
    """The largest divisor of n for which there is a matrix; 1 if n is odd."""
    if n < 1:
        raise ValueError(f"n={n} must be positive.")
    return next(n // d for d in range(1, n + 1) if n % d == 0 and _factor(n // d))


@functools.cache
def hadamard_matrix(n: int) -> Int8[Any, "{n} {n}"]:
    """H of order n in NumPy, read-only: the m × m matrix of `factor(n)` ⊗ Sylvester's."""
    m, power = factor(n)
    rows = _recipe(m)
    assert rows is not None
    sylvester = [[(-1) ** (i & j).bit_count() for j in range(power)] for i in range(power)]
    with jax.ensure_compile_time_eval():  # numbers also where a caller is being traced
        return jax.device_get(jnp.asarray(_kronecker(rows(), sylvester), jnp.int8))


def _factor(n: int) -> tuple[int, int] | None:
    if n < 1:
        raise ValueError(f"n={n} must be positive.")
    twos = (n & -n).bit_length() - 1
    return next(((n >> k, 1 << k) for k in range(twos, -1, -1) if _recipe(n >> k)), None)


@functools.cache
def _recipe(m: int) -> Callable[[], Rows] | None:
    """What makes a matrix of order m without doubling one of m / 2; None if nothing does."""
    if m == 1:
        return lambda: [[1]]
    if m % 4:
        return None
    if m // 4 in CIRCULANTS:
        return functools.partial(_goethals_seidel, CIRCULANTS[m // 4])
    if field := _prime_power(m - 1):
        return functools.partial(_paley_one, *field)
    if m % 8 == 4 and (field := _prime_power(m // 2 - 1)):
        return functools.partial(_paley_two, *field)
    for a in range(4, math.isqrt(m) + 1, 4):
        if m % a == 0 and (left := _recipe(a)) and (right := _recipe(m // a)):
            return lambda: _kronecker(left(), right())
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p an odd prime."""
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = round(math.log(q, p))
    return (p, k) if q > 2 and q % 2 and p**k == q else None


def _kronecker(left: Rows, right: Rows) -> Rows:
    return [[a * b for a in x for b in y] for x in left for y in right]


def _paley_one(p: int, k: int) -> Rows:
    q = _characters(p, k)
    skew = [[0] + [1] * len(q)] + [[-1] + row for row in q]
    return [[x + (i == j) for j, x in enumerate(row)] for i, row in enumerate(skew)]


def _paley_two(p: int, k: int) -> Rows:
    q = _characters(p, k)
    conference = [[0] + [1] * len(q)] + [[1] + row for row in q]
    block = {0: [[1, -1], [-1, -1]], 1: [[1, 1], [1, -1]], -1: [[-1, -1], [-1, 1]]}
    return [[y for x in row for y in block[x][half]] for row in conference for half in (0, 1)]


def _characters(p: int, k: int) -> Rows:
    """Q_ab = χ(a - b) over GF(p^k), an element's number being its coefficients in base p."""
    chi = [0] + [-1] * (p**k - 1)
    for element in _powers_of_a_primitive_element(p, k)[::2]:
        chi[functools.reduce(lambda number, digit: number * p + digit, element)] = 1
    return _develop(chi, p)


def _powers_of_a_primitive_element(p: int, k: int) -> list[tuple[int, ...]]:
    """Every nonzero element of GF(p^k), as the powers of x modulo some x^k - Σ c_j x^j: the first
    for which they are all different. Coefficients from the highest down.
    """
    one = (0,) * (k - 1) + (1,)
    for c in itertools.product(range(p), repeat=k):
        powers, element = [one], one
        while len(powers) < p**k and any(element):
            top, shifted = element[0], (*element[1:], 0)
            element = tuple((s + top * a) % p for s, a in zip(shifted, c, strict=True))
            if element == one:
                break
            powers.append(element)
        if len(powers) == p**k - 1 and element == one:
            return powers
    raise AssertionError(f"GF({p}^{k}) has a primitive element.")


def _develop(table: list[int], p: int) -> Rows:
    """M_ab = table[a - b], the difference digit by digit in base p; circulant if p is all."""
    if len(table) == 1:
        return [table]
    n = len(table) // p
    blocks = [_develop(table[d * n : (d + 1) * n], p) for d in range(p)]
    return [
        [x for j in range(p) for x in blocks[(i - j) % p][row]]
        for i in range(p)
        for row in range(n)
    ]


def _goethals_seidel(tables: tuple[str, ...]) -> Rows:
    """[[A, BR, CR, DR], [-BR, A, -DᵀR, CᵀR], [-CR, DᵀR, A, -BᵀR], [-DR, -CᵀR, BᵀR, A]], R the
    reversal of columns, A_ij = table[i - j].
    """
    n = len(tables[0])
    signs = [[1 if sign == "+" else -1 for sign in table] for table in tables]
    a = _develop(signs[0], n)
    b, c, d = ([row[::-1] for row in _develop(table, n)] for table in signs[1:])
    flipped = [[table[-j] for j in range(n)] for table in signs[1:]]
    bt, ct, dt = ([row[::-1] for row in _develop(table, n)] for table in flipped)
    blocks = [
        [(1, a), (1, b), (1, c), (1, d)],
        [(-1, b), (1, a), (-1, dt), (1, ct)],
        [(-1, c), (1, dt), (1, a), (-1, bt)],
        [(-1, d), (-1, ct), (1, bt), (1, a)],
    ]
    return [
        [sign * x for sign, block in line for x in block[row]]
        for line in blocks
        for row in range(n)
    ]
