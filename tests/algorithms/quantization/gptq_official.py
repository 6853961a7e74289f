"""A slow NumPy float64 port of the official GPTQ code, the oracle of test_gptq.py and test_rtn.py.

Source: github.com/IST-DASLab/gptq at commit 2d65066, `GPTQ.fasterquant` in gptq.py and `Quantizer`
in quant.py (Apache-2.0), for a linear layer with per-channel weights. Its option names are kept.
Ported step by step, its quirks included; left out are the ternary grid (`trits`), other layers than
linear ones, and per-tensor grids. Added are the integer codes, which the official code never keeps,
and a stable sort, where torch leaves the order of equal diagonal entries open.
"""

from typing import NamedTuple

import numpy as np


class Grid(NamedTuple):
    """One uniform grid per row: codes 0 … maxq stand for scale (code - zero)."""

    scale: np.ndarray  # [o]
    zero: np.ndarray  # [o], whole numbers
    maxq: int

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """Codes of x [o, n]; NumPy, like torch, rounds halves to even."""
        codes = np.round(x / self.scale[:, None]) + self.zero[:, None]
        return np.clip(codes, 0, self.maxq)

    def dequantize(self, codes: np.ndarray) -> np.ndarray:
        return self.scale[:, None] * (codes - self.zero[:, None])


class Result(NamedTuple):
    """What `fasterquant` finds for W [o, i] with g groups; columns in their original order."""

    codes: np.ndarray  # uint8 [o, i]
    scale: np.ndarray  # [o, g]
    zero: np.ndarray  # [o, g]
    q: np.ndarray  # [o, i], dequantized
    loss: float  # Σ (w - q)² / (2 d²) over the columns as they are quantized


def find_params(
    x: np.ndarray,
    bits: int,
    sym: bool,
    mse: bool = False,
    norm: float = 2.4,
    grid: int = 100,
    maxshrink: float = 0.8,
) -> Grid:
    """The range of each row of x [o, n]: its minimum and maximum, or with `mse` a shrunken one."""
    maxq = 2**bits - 1
    xmin, xmax = np.minimum(x.min(1), 0.0), np.maximum(x.max(1), 0.0)
    if sym:
        xmax = np.maximum(np.abs(xmin), xmax)
        xmin = np.where(xmin < 0, -xmax, xmin)  # rows without negative weights keep xmin = 0
    empty = (xmin == 0) & (xmax == 0)
    xmin, xmax = np.where(empty, -1.0, xmin), np.where(empty, 1.0, xmax)
    scale = (xmax - xmin) / maxq
    zero = np.full_like(scale, (maxq + 1) / 2) if sym else np.round(-xmin / scale)
    if not mse:
        return Grid(scale, zero, maxq)

    best = np.full_like(scale, np.inf)
    best_scale, best_zero = scale.copy(), zero.copy()
    for step in range(int(maxshrink * grid)):
        p = 1 - step / grid
        scale1 = (p * xmax - p * xmin) / maxq
        zero1 = zero if sym else np.round(-(p * xmin) / scale1)
        tried = Grid(scale1, zero1, maxq)
        error = (np.abs(tried.dequantize(tried.quantize(x)) - x) ** norm).sum(1)
        better = error < best
        best[better] = error[better]
        best_scale[better], best_zero[better] = scale1[better], zero1[better]
    return Grid(best_scale, best_zero, maxq)


def hessian(x: np.ndarray) -> np.ndarray:
    """2/n X Xᵀ of n activations x [n, i], as `add_batch` accumulates it."""
    return 2 / len(x) * x.T @ x


def fasterquant(
    w: np.ndarray,
    h: np.ndarray,
    *,
    bits: int,
    sym: bool,
    mse: bool = False,
    blocksize: int = 128,
    percdamp: float = 0.01,
    groupsize: int = -1,
    actorder: bool = False,
    static_groups: bool = False,
) -> Result:
    """Quantize W [o, i] given its Hessian [i, i]. `groupsize` -1: one group per row.

    Raises ValueError for groups formed in permuted order (`actorder` without `static_groups`),
    whose grids belong to no consecutive columns.
    """
    if actorder and groupsize != -1 and not static_groups:
        raise ValueError("groups in permuted order have no [o, g] table of scales.")
    w, h, columns = w.copy(), h.copy(), w.shape[1]
    whole = find_params(w, bits, sym, mse)  # before dead inputs are cleared, as there
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0

    width = columns if groupsize == -1 else groupsize
    grids = [whole] * (columns // width)
    if static_groups and groupsize != -1:
        starts = range(0, columns, groupsize)
        grids = [find_params(w[:, i : i + groupsize], bits, sym, mse) for i in starts]

    perm = np.argsort(-np.diag(h), kind="stable") if actorder else np.arange(columns)
    w, h = w[:, perm], h[perm][:, perm]
    hinv = inverse_factor(h, percdamp)
    codes, q, losses = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)

    for i1 in range(0, columns, blocksize):
        i2 = min(i1 + blocksize, columns)
        w1, err1, hinv1 = w[:, i1:i2].copy(), np.zeros_like(w[:, i1:i2]), hinv[i1:i2, i1:i2]
        for i in range(i2 - i1):
            column, d = w1[:, i : i + 1].copy(), hinv1[i, i]
            group = perm[i1 + i] // width
            if groupsize != -1 and not static_groups and (i1 + i) % groupsize == 0:
                # From w, not w1: the columns before i in this block have not reached it yet.
                fresh = w[:, i1 + i : i1 + i + groupsize]
                grids[group] = find_params(fresh, bits, sym, mse)
            grid = grids[group]
            code = grid.quantize(column)
            value = grid.dequantize(code)
            codes[:, i1 + i], q[:, i1 + i] = code[:, 0], value[:, 0]
            losses[:, i1 + i] = ((column - value) ** 2 / d**2)[:, 0] / 2
            err = (column - value) / d
            w1[:, i:] -= err @ hinv1[i : i + 1, i:]
            err1[:, i] = err[:, 0]
        w[:, i2:] -= err1 @ hinv[i1:i2, i2:]

    back = np.argsort(perm)
    scale, zero = (np.stack([getattr(g, k) for g in grids], 1) for k in ("scale", "zero"))
    return Result(codes[:, back].astype(np.uint8), scale, zero, q[:, back], float(losses.sum()))


def inverse_factor(h: np.ndarray, percdamp: float) -> np.ndarray:
    """The upper triangular Cholesky factor of (H + λ I)⁻¹, λ = percdamp · mean(diag H).

    Raises numpy.linalg.LinAlgError if H + λ I is not positive definite.
    """
    damped = h + percdamp * np.mean(np.diag(h)) * np.eye(len(h))
    lower_inverse = np.linalg.inv(np.linalg.cholesky(damped))
    return np.linalg.cholesky(lower_inverse.T @ lower_inverse).T
