"""A NumPy float64 port, the oracle of test_function_matching.py.

Source: github.com/google-research/big_vision at commit 11eea57 (Apache-2.0), `get_mixup` of
big_vision/utils.py, with the share that it draws given; `dist` of kind "kl" of
big_vision/evaluators/proj/distill/distance.py at commit 2f3f493.
"""

import numpy as np

from tests.algorithms.distillation.divergences_official import log_softmax


def mixup(x: np.ndarray, drawn: float) -> np.ndarray:
    a = max(drawn, 1.0 - drawn)
    return a * x + (1 - a) * np.roll(x, 1, axis=0)


def kl(student: np.ndarray, teacher: np.ndarray, t: float) -> np.ndarray:
    log_p = log_softmax(teacher / t)
    return t**2 * (np.exp(log_p) * (log_p - log_softmax(student / t))).sum(-1)
