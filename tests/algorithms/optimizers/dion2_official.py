"""A slow NumPy float64 port of the official Dion2, the oracle of test_dion2.py.

Source: dion/dion2.py of github.com/microsoft/dion at commit 0a059a4: `dion2_pre_orthogonalize` and
`dion2_post_orthogonalize` on one device, the rate adjusted by `adjust_lr_spectral_norm` of
dion/megabatch_base.py, without bfloat16.
"""

import math

import numpy as np

from tests.algorithms.polar_official import newton_schulz

# dion/polar_express.py: five steps of their own, whose norm is taken 1.02 times
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
ROOM, EPSILON = 1.02, 1e-8


def polar(g):
    return newton_schulz(g, POLAR_EXPRESS, room=ROOM, eps=EPSILON)


def dion2(w, gradient, steps, *, lr, fraction=0.25, ef_decay=0.95, weight_decay=0.01):
    """W [out, in] after each step."""
    momentum, found = np.zeros_like(w), []
    rows = w.shape[0] <= w.shape[1]
    for step in range(steps):
        momentum = momentum + gradient(w, step)
        m = momentum if rows else momentum.T  # a view: what is chosen are rows of m
        count = max(1, math.ceil(fraction * len(m)))
        chosen = np.argsort(-np.abs(m).sum(1))[:count]
        update = np.zeros_like(m)
        update[chosen] = polar(m[chosen]) if rows else polar(m[chosen].T).T
        m[chosen] *= ef_decay
        update = update if rows else update.T
        w = w * (1 - lr * weight_decay) - lr * math.sqrt(w.shape[0] / w.shape[1]) * update
        found.append(w)
    return found
