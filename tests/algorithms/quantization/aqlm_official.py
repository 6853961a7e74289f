"""A slow NumPy float64 port of the official AQLM code, the oracle of test_aqlm.py.

Source: github.com/Vahe1994/AQLM at commit e79a896 (Apache-2.0): `beam_search_optimal_codes` in
src/beam_search_xtx.py, `_dequantize_weight` in src/utils.py, and the training of codebooks and
scales in aq_engine.py (`AQEngine.quantize`, torch's Adam with betas (0, 0.95) and amsgrad), for
groups within one row and one scale per row. One row at a time, each candidate's loss computed in
full where the official code adds up what changes. Left out are the sparsity regularizer and groups
of several rows. The order of the groups, drawn there, is an argument; that of codebooks is 0, 1, …,
as it is there without a generator.
"""

import numpy as np


def dequantize(codes: np.ndarray, codebooks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Ŵ [o, i] from codes [o, g, m], codebooks [m, k, c] and scale [o]."""
    parts = [codebooks[m][codes[:, :, m]] for m in range(len(codebooks))]
    return scale[:, None] * np.sum(parts, 0).reshape(len(codes), -1)


def row_loss(row: np.ndarray, xtx: np.ndarray, codes: np.ndarray, codebooks, scale: float) -> float:
    """‖X (w - ŵ)‖² of one row's codes [g, m]."""
    d = row - dequantize(codes[None], codebooks, np.array([scale]))[0]
    return d @ xtx @ d


def beam_search(
    w: np.ndarray,
    xtx: np.ndarray,
    codes: np.ndarray,
    codebooks: np.ndarray,
    scale: np.ndarray,
    *,
    beam_size: int,
    order=None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best codes [o, g, m] found from the given ones, and their losses [o]."""
    order = range(codes.shape[1]) if order is None else order
    rows = [
        _search_row(w[r], xtx, codes[r], codebooks, scale[r], beam_size, order)
        for r in range(len(w))
    ]
    return np.stack([row[0] for row in rows]), np.array([row[1] for row in rows])


def _search_row(row, xtx, codes, codebooks, scale, beam_size, order):
    beam = [(row_loss(row, xtx, codes, codebooks, scale), codes)]
    for group in order:
        for m in range(len(codebooks)):
            tried = []
            for _, hypothesis in beam:
                for k in range(codebooks.shape[1]):
                    candidate = hypothesis.copy()
                    candidate[group, m] = k
                    loss = row_loss(row, xtx, candidate, codebooks, scale)
                    tried.append((loss, len(tried), candidate))
            beam = [(loss, candidate) for loss, _, candidate in sorted(tried)[:beam_size]]
    return beam[0][1], beam[0][0]


def gradients(w, xtx, codes, codebooks, scale):
    """The official loss, ‖X (W - Ŵ)ᵀ‖² / o, and its gradients by codebooks and scale."""
    u = dequantize(codes, codebooks, np.ones(len(w)))
    d = scale[:, None] * u - w
    pull = 2 * d @ xtx / len(w)
    groups = (scale[:, None] * pull).reshape(*codes.shape[:2], -1)
    by_codebooks = np.zeros_like(codebooks)
    for m in range(len(codebooks)):
        np.add.at(by_codebooks[m], codes[:, :, m], groups)
    return np.sum(d @ xtx * d) / len(w), by_codebooks, np.sum(pull * u, 1)


def adam(w, xtx, codes, codebooks, scale, *, steps: int, lr: float, beta: float = 0.95):
    """Codebooks and scale after `steps` of torch's Adam with betas (0, beta) and amsgrad."""
    parameters = [codebooks.copy(), scale.copy()]
    second = [np.zeros_like(p) for p in parameters]
    largest = [np.zeros_like(p) for p in parameters]
    for t in range(1, steps + 1):
        _, *gradient = gradients(w, xtx, codes, *parameters)
        for n, g in enumerate(gradient):
            second[n] = beta * second[n] + (1 - beta) * g**2
            largest[n] = np.maximum(largest[n], second[n])
            parameters[n] -= lr * g / (np.sqrt(largest[n] / (1 - beta**t)) + 1e-8)
    return parameters
