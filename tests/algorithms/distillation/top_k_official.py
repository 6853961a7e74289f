"""Slow NumPy float64 ports, the oracles of test_top_k_logits.py.

Source: github.com/arcee-ai/DistillKit at commit a61c2e7 (Apache-2.0): `sparse_kl` is
`sparse_kl_div_inner` of distillkit/lossfuncs/kl.py with `get_logprobs` of common.py at temperature
1, for one token; `polynomial` is `fit_polynomial` and its inverse in
distillkit/compression/monotonic_logprobs.py; `total_bits` is that of compression/config.py.
"""

import numpy as np

from tests.algorithms.distillation.divergences_official import log_softmax

EPS = 1e-8


def sparse_kl(student: np.ndarray, ids: np.ndarray, log_p: np.ndarray, *, missing: str) -> float:
    """missing: "zero" or "symmetric_uniform"; log_p: log-probabilities of the teacher's `ids`."""
    log_q = log_softmax(student)[ids]
    if missing == "zero":
        log_p = log_p - np.log(np.exp(log_p).sum())
    p = np.exp(log_p)
    total = (p * (log_p - log_q)).sum()
    if missing == "symmetric_uniform":
        log_missing_p = np.log1p(-np.clip(p.sum(), EPS, 1 - EPS))
        log_missing_q = np.log1p(-np.clip(np.exp(log_q).sum(), EPS, 1 - EPS))
        total += np.exp(log_missing_p) * (log_missing_p - log_missing_q)
    return total


def polynomial(values: np.ndarray) -> np.ndarray:
    """The values of one token fitted in their rank, by the terms 0 to 4 and the root."""
    t = np.arange(len(values), dtype=np.float64)
    terms = np.stack([t**0, t, t**2, t**3, t**4, np.sqrt(t)], -1)
    u, s, vh = np.linalg.svd(terms, full_matrices=False)
    inverse = np.where(s > 1e-5, 1 / s, 0)
    return terms @ (vh.T @ (inverse * (u.T @ values)))


def total_bits(d: int, k: int, exact_k: int, exact_bits: int, terms: int, term_bits: int) -> int:
    """Without bins of residuals."""
    index_bits = int(np.ceil(np.log2(d)))
    return exact_k * exact_bits + terms * term_bits + (k * index_bits + 7) // 8 * 8
