"""A slow NumPy float64 port of the official QuIP# code, the oracle of its tests.

Source: github.com/Cornell-RelaxML/quip-sharp at commit 1d8f873, `block_LDL` and `regularize_H` in
lib/utils/math_utils.py, `LDLQ` and the scale of `quantize` in lib/algo/quip.py, and the codebooks
of lib/codebook/latticee8_padded12.py, _rvq3bit.py and _rvq4bit.py (GPL-3.0; nothing is copied:
formulas and the table of points, which the paper has too, are written anew). Where that code needs
CUDA, this has its equations. The nearest point is looked for among all 65536. Left out are the
rotations, fine-tuning, low-rank corrections, and the rounds of coordinate descent after LDLQ.
"""

import functools
import itertools
from collections.abc import Callable

import numpy as np


def regularize(h: np.ndarray, sigma: float) -> np.ndarray:
    """H over the mean of its diagonal, plus σ on the diagonal."""
    return h / np.mean(np.diag(h)) + sigma * np.eye(len(h))


def block_ldl(h: np.ndarray, b: int) -> tuple[np.ndarray, np.ndarray]:
    """L [n, n] with identities of b × b on its diagonal, and D [n / b, b, b]: H = L D Lᵀ."""
    root = np.linalg.cholesky(h)
    unit, d = root.copy(), []
    for k in range(0, len(h), b):
        block = root[k : k + b, k : k + b]
        unit[:, k : k + b] = root[:, k : k + b] @ np.linalg.inv(block)
        d.append(block @ block.T)
    return unit, np.stack(d)


def ldlq(w: np.ndarray, unit: np.ndarray, quantize: Callable, b: int) -> np.ndarray:
    """Blocks of b columns from the last to the first, each with the errors so far fed back."""
    done, n = np.zeros_like(w), w.shape[1]
    for k in reversed(range(0, n, b)):
        late = slice(k + b, n)
        asked = w[:, k : k + b] + (w[:, late] - done[:, late]) @ unit[late, k : k + b]
        done[:, k : k + b] = quantize(asked)
    return done


# The rows of `get_norm12`, in halves: a digit for each entry.
NORM_12 = """
    31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133
    33133311 33133131 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113
    31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331
"""
OPT_SCALE = {2: 1.03, 3: 0.98, 4: 1.03}
OPT_RESID_SCALE = {3: 2.04, 4: 3.45}


@functools.cache
def abs_grid() -> np.ndarray:
    """[256, 8]: magnitudes of the half-integral points with an even sum and |x|² <= 10, sorted."""
    halves = np.array(list(itertools.product([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], repeat=4)))
    first, norm = np.abs(halves), (halves**2).sum(1)
    pairs = np.argwhere(norm[:, None] + norm[None] <= 10)
    pairs = pairs[(halves[pairs[:, 0]].sum(1) + halves[pairs[:, 1]].sum(1)) % 2 == 0]
    short = np.unique(np.concatenate([first[pairs[:, 0]], first[pairs[:, 1]]], 1), axis=0)
    long = np.array([[int(digit) for digit in row] for row in NORM_12.split()]) / 2
    return np.concatenate([short, long])


@functools.cache
def full_grid() -> np.ndarray:
    """[65536, 8]: what each code means, by the 32-bit words that `get_packed_abs_grid` packs."""
    shuffled = abs_grid()[:, [0, 2, 4, 6, 1, 3, 5, 7]]
    shuffled[:, 7] *= 1 - 2 * (shuffled.sum(1) % 2)
    grid, place = np.zeros((1 << 16, 8)), [0, 4, 1, 5, 2, 6, 3, 7]
    for code in range(1 << 16):
        signs = code & 255
        parity = bin(signs).count("1") % 2
        signs ^= parity
        for i in range(8):
            value = shuffled[code >> 8, place[i]]
            grid[code, i] = -value if signs >> place[i] & 1 else value
        grid[code] += -0.25 if parity else 0.25
    return grid


@functools.cache
def e81b_grid() -> np.ndarray:
    """[256, 8]: E8 up to |x|² = 2, whole vectors first, and 15 of the 16 vectors ± 2 e_i."""
    whole = np.array(list(itertools.product([-1, 0, 1], repeat=8)), float)
    halves = np.array(list(itertools.product([-0.5, 0.5], repeat=8)))
    both = np.concatenate([whole, halves])
    both = both[(both.sum(1) % 2 == 0) & ((both**2).sum(1) <= 2)]
    longer = np.concatenate([2 * np.eye(8), -2 * np.eye(8)])
    return np.concatenate([both, longer[:15]])


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The index of the nearest point of `grid` to each of x [n, 8]."""
    return (2 * x @ grid.T - (grid**2).sum(1)).argmax(1)


def quantize(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """First codes, residual codes, and the points of x [n, 8]."""
    first = nearest(x, full_grid())
    point = full_grid()[first]
    if bits == 2:
        return first, None, point
    scale = OPT_RESID_SCALE[bits]
    finer = e81b_grid() if bits == 3 else full_grid()
    residual = nearest((x - point) * scale, finer)
    return first, residual, point + finer[residual] / scale


def quantize_layer(w: np.ndarray, h: np.ndarray, scale: np.ndarray, bits: int, sigma: float):
    """Codes [o, i/8], residual codes and Ŵ of a rotated W, given a scale for each row."""
    codes: list = []

    def step(asked):
        *found, point = quantize(asked, bits)
        codes.insert(0, found)
        return point

    unit, _ = block_ldl(regularize(h, sigma), 8)
    points = ldlq(w / scale[:, None], unit, step, 8)
    first, residual = zip(*codes, strict=True)
    return (
        np.stack(first, 1),
        None if bits == 2 else np.stack(residual, 1),
        points * scale[:, None],
    )
