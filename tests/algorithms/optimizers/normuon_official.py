"""A slow NumPy float64 port of the official NorMuon, the oracle of test_normuon.py.

Source: `normuon_update` and `SingleDeviceNorMuon` in normuon.py of github.com/zichongli5/NorMuon at
commit d45c9a4, without its bfloat16.
"""

import numpy as np

from tests.algorithms.polar_official import newton_schulz


def normuon(
    w, gradient, steps, *, lr=0.02, weight_decay=0.0, momentum=0.95, beta2=0.95, nesterov=True,
    polar=newton_schulz,
):  # fmt: skip
    """W [out, in] after each step."""
    average, second, found = np.zeros_like(w), np.zeros((len(w), 1)), []
    for step in range(steps):
        g = gradient(w, step)
        average = average + (1 - momentum) * (g - average)
        update = polar(g + momentum * (average - g) if nesterov else average)
        before = np.linalg.norm(update)
        second = second + (1 - beta2) * ((update**2).mean(1, keepdims=True) - second)
        update = update / (np.sqrt(second) + 1e-10)
        update = update * before / (np.linalg.norm(update) + 1e-10)
        update = update * max(1, w.shape[0] / w.shape[1]) ** 0.5
        w = w * (1 - lr * weight_decay) - lr * update
        found.append(w)
    return found
