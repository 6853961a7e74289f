"""A slow NumPy float64 port of QuIP#'s incoherence processing, the oracle of test_incoherence.py.

Source: github.com/Cornell-RelaxML/quip-sharp (GPL-3.0), `matmul_hadU` and `matmul_hadUt` in
lib/utils/matmul_had.py at commit 2ddaccf, `RHT_H`, `RHT_W` and `incoherence_process` in
lib/algo/quip.py at commit 4674ace. Written anew from what they compute. Its tables of Hadamard
matrices are an argument: (K, K × K matrix). Left out is its rescaling of W and H by their columns'
norms, a step of its own that comes first.
"""

import numpy as np

TABLE_12 = [  # its matrix of order 12, a row per string
    "+-----------",
    "++-+---+++-+",
    "+++-+---+++-",
    "+-++-+---+++",
    "++-++-+---++",
    "+++-++-+---+",
    "++++-++-+---",
    "+-+++-++-+--",
    "+--+++-++-+-",
    "+---+++-++-+",
    "++---+++-++-",
    "+-+---+++-++",
]


def had12() -> np.ndarray:
    return np.array([[1.0 if sign == "+" else -1.0 for sign in row] for row in TABLE_12])


def matmul_had_u(x: np.ndarray, table: np.ndarray, transpose: bool = False) -> np.ndarray:
    """Sums and differences of neighbours until K numbers are left, then the K × K matrix."""
    n, k = x.shape[-1], len(table)
    out = np.empty((x.size // n, n))
    for row, vector in zip(out, x.reshape(-1, n), strict=True):
        work = vector.reshape(n, 1)
        while len(work) > k:
            pairs = work.reshape(len(work) // 2, 2, -1)
            sums, differences = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
            work = np.concatenate([sums, differences], axis=1)
        row[:] = ((table.T if transpose else table) @ work).reshape(n)
    return out.reshape(x.shape) / np.sqrt(n)


def matmul_had_ut(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    return matmul_had_u(x, table, transpose=True)


def rht_h(h: np.ndarray, su: np.ndarray, table: np.ndarray) -> np.ndarray:
    return matmul_had_ut(matmul_had_ut(h * su, table).T * su, table)


def rht_w(
    w: np.ndarray, su: np.ndarray, sv: np.ndarray, table_in: np.ndarray, table_out: np.ndarray
) -> np.ndarray:
    return matmul_had_ut(matmul_had_ut(w.T * sv, table_out).T * su, table_in)


def incoherence_process(
    w: np.ndarray, su: np.ndarray, sv: np.ndarray, table_in: np.ndarray, table_out: np.ndarray
) -> np.ndarray:
    """Back to the original coordinates."""
    return (matmul_had_u((matmul_had_u(w, table_in) * su).T, table_out) * sv).T
