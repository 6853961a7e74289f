"""A slow NumPy float64 port of the official Newton-Schulz iterations, an oracle of several tests.

Sources, none of whose bfloat16 is ported:
    `zeropower_via_newtonschulz5` of github.com/KellerJordan/Muon, as it stands in normuon.py of
        github.com/zichongli5/NorMuon at commit d45c9a4;
    `optimal_composition` in polar_express.py and `PolarExpress` in polar_express/basic.py of
        github.com/NoahAmsel/PolarExpress at commits 5454910 and 7f0fb57.
"""

import numpy as np

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5


def newton_schulz(g, quintics=JORDAN, *, room=1.0, eps=1e-7):
    """room: what the norm is taken times: 1 in Jordan's code, 1.01 in Amsel's."""
    x = g if g.shape[0] <= g.shape[1] else g.T
    x = x / (room * np.linalg.norm(x) + eps)
    for a, b, c in quintics:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if g.shape[0] <= g.shape[1] else x.T


def polar_express(g, steps=5):
    listed = optimal_composition(1e-3, 8, cushion=0.02407327424182761)
    safe = [tuple(np.array(p) / 1.01 ** np.array([1, 3, 5])) for p in listed[:-1]]
    return newton_schulz(g, (safe + [listed[-1]] * steps)[:steps], room=1.01)


def optimal_composition(lower, steps, *, cushion=0.0):
    upper, found = 1.0, []
    for _ in range(steps):
        p = optimal_quintic(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            p = p * 2 / (value(p, lower) + value(p, upper))
        found.append(tuple(p))
        lower = value(p, lower)
        upper = 2 - lower
    return found


def optimal_quintic(lower, upper):
    """The odd quintic nearest to one on an interval, by Remez' exchange."""
    if lower / upper >= 1 - 5e-6:
        return np.array([15, -10, 3]) / 8 / upper ** np.array([1, 3, 5])
    inner, error = np.array([3 * lower + 1, lower + 3]) / 4, np.inf
    while True:
        nodes = np.array([lower, *inner, upper])
        system = np.stack([nodes, nodes**3, nodes**5, [1, -1, 1, -1]], axis=1)
        *p, last = np.linalg.solve(system, np.ones(4))
        if abs(error - last) <= 1e-15:
            return np.array(p)
        error = last
        inner = np.sqrt(np.sort(np.roots([5 * p[2], 3 * p[1], p[0]])))


def value(p, s):
    """p(s) = a s + b s³ + c s⁵."""
    return p[0] * s + p[1] * s**3 + p[2] * s**5


def composed(quintics, s):
    for p in quintics:
        s = value(p, s)
    return s
