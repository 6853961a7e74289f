"""Slow NumPy float64 ports, the oracles of test_divergences.py and test_gkd.py.

`generalized_jsd`: github.com/huggingface/trl at commit 054a0da (Apache-2.0), the function of that
name in trl/experimental/gkd/gkd_trainer.py. GKD's authors have published no code.
The others: github.com/jongwooko/distillm at commit 17c0f98 (no licence is stated), functions of
those names in distillm/losses.py. Masks are over tokens, logits [B, T, V].
"""

import numpy as np


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _kl_div(log_input: np.ndarray, log_target: np.ndarray) -> np.ndarray:
    """torch's, of each entry: the target comes first in the divergence."""
    return np.exp(log_target) * (log_target - log_input)


def generalized_jsd(student, teacher, mask, *, beta: float, temperature: float = 1.0) -> float:
    """reduction="batchmean" with labels: over the tokens of all sequences."""
    log_q, log_p = log_softmax(student / temperature), log_softmax(teacher / temperature)
    if beta == 0:
        jsd = _kl_div(log_q, log_p)
    elif beta == 1:
        jsd = _kl_div(log_p, log_q)
    else:
        log_m = np.logaddexp(log_q + np.log1p(-beta), log_p + np.log(beta))
        jsd = beta * _kl_div(log_m, log_p) + (1 - beta) * _kl_div(log_m, log_q)
    return jsd[mask].sum() / mask.sum()


def _over_tokens(x: np.ndarray, mask: np.ndarray) -> float:
    return -(x * mask).sum() / mask.sum()


def forward_kl(student, teacher, mask) -> float:
    """The cross-entropy."""
    p = np.exp(log_softmax(teacher))
    return _over_tokens((p * log_softmax(student)).sum(-1), mask)


def reverse_kl(student, teacher, mask) -> float:
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    return _over_tokens((np.exp(log_q) * log_p - np.exp(log_q) * log_q).sum(-1), mask)


def js_distance(student, teacher, mask, lam: float = 0.9) -> float:
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    q, p = np.exp(log_q), np.exp(log_p)
    log_m = np.log((1 - lam) * p + lam * q)
    loss = lam * _over_tokens((q * log_m - q * log_q).sum(-1), mask)
    return loss + (1 - lam) * _over_tokens((p * log_m - p * log_p).sum(-1), mask)


def tv_distance(student, teacher, mask) -> float:
    q, p = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    return -_over_tokens(0.5 * np.abs(p - q).sum(-1), mask)


def skewed_forward_kl(student, teacher, mask, lam: float = 0.1) -> float:
    """The cross-entropy."""
    q, p = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    return _over_tokens((p * np.log(lam * p + (1 - lam) * q)).sum(-1), mask)


def skewed_reverse_kl(student, teacher, mask, lam: float = 0.1) -> float:
    log_q = log_softmax(student)
    q, p = np.exp(log_q), np.exp(log_softmax(teacher))
    log_m = np.log((1 - lam) * p + lam * q)
    return _over_tokens((q * log_m - q * log_q).sum(-1), mask)


def entropy(teacher, mask) -> float:
    """What the cross-entropies above are more than divergences; not of the code."""
    log_p = log_softmax(teacher)
    return _over_tokens((np.exp(log_p) * log_p).sum(-1), mask)
