"""A slow NumPy float64 port of the official QTIP code, the oracle of test_qtip.py, test_trellis.py.

Source: github.com/Cornell-RelaxML/qtip at commit 1bef249 for lib/codebook/bitshift.py, bdad4e5 for
lib/algo/ldlq.py, 05fd393 for lib/algo/finetune.py, edfce80 for lib/utils/math_utils.py (GPL-3.0):
its arithmetic in our own words, one sequence and one state at a time. Option names are the official
ones: L bits of a state, K bits a weight, V = 1 weight a step, tiles of td x td weights.

Left out: the cast of sequences to float16, codes with V = 2, rotations, and fine-tuning.
"""

import numpy as np


def one_mad(state: int) -> float:
    """`decode_1mad` in whole numbers of any size."""
    mixed = (state * 34038481 + 76625530) % 2**32
    return float(np.float32(sum(mixed.to_bytes(4, "big")) - 510) / np.float32(147.800537109375))


def three_inst(state: int) -> float:
    """`decode_3inst`: two halves of a word read as float16, added in float16."""
    mixed = (state * 89226354 + 64248484) % 2**32
    mixed = (mixed & 0b10001111111111111000111111111111) ^ 996162400
    top, bottom = (np.array(h, np.uint16).view(np.float16) for h in divmod(mixed, 2**16))
    return float(top + bottom)


def viterbi(x, lut, K, overlap=None):
    """The nearest walk to x [T], held to begin and end on the L - K bits of `overlap`."""
    S, T = len(lut), len(x)
    M = S >> K
    came_from = np.zeros((T, S), int)
    cost = (lut - x[0]) ** 2
    if overlap is not None:
        cost[[s for s in range(S) if s >> K != overlap]] = np.inf
    for t in range(1, T):
        candidates = [[(s >> K) + j * M for j in range(2**K)] for s in range(S)]
        best = np.argmin(cost[candidates], axis=1)
        came_from[t] = [row[j] for row, j in zip(candidates, best, strict=True)]
        cost = (lut - x[t]) ** 2 + cost[came_from[t]]
    if overlap is not None:
        cost[[s for s in range(S) if s % M != overlap]] = np.inf
    states = [int(np.argmin(cost))]
    for t in range(T - 1, 0, -1):
        states.append(int(came_from[t, states[-1]]))
    return np.array(states[::-1])


def quantize(x, lut, K):
    """`bitshift_codebook.quantize`: once from the middle for the seam, once held to it."""
    T = len(x)
    seam = viterbi(np.roll(x, T // 2), lut, K)[T // 2] >> K
    return viterbi(x, lut, K, overlap=seam)


def pack_trellis(states, K, L):
    """The bits of a walk as 16-bit words: all of the first state, then each state's new ones."""
    bits = format(states[0], f"0{L}b") + "".join(format(s % 2**K, f"0{K}b") for s in states[1:])
    bits = bits[: len(states) * K]
    bits += "0" * (-len(bits) % 16)
    return np.array([int(bits[n : n + 16], 2) for n in range(0, len(bits), 16)], np.uint16)


def block_ldl(h, b):
    """L of H = L D Lᵀ with identities of b x b on its diagonal, from a Cholesky factor."""
    lower = np.linalg.cholesky(h)
    for k in range(0, len(h), b):
        lower[:, k : k + b] = lower[:, k : k + b] @ np.linalg.inv(lower[k : k + b, k : k + b])
    return lower


def quantize_weight(wr, hr, lut, *, K, L, td, scale_override, sigma_reg):
    """Rotated weights and Hessian to (Ŵ, packed walks [o / td, i / td, words], Wscale)."""
    m, n = wr.shape
    hr = hr + sigma_reg * np.mean(np.diag(hr)) * np.eye(n)
    wscale = np.sqrt(np.mean(wr**2)) / (np.sqrt(np.mean(lut**2)) * scale_override)
    wr, feedback = wr / wscale, block_ldl(hr, td)
    hat, packed = np.zeros_like(wr), {}
    for k in range(n // td - 1, -1, -1):
        now, later = slice(k * td, (k + 1) * td), slice((k + 1) * td, n)
        target = wr[:, now] + (wr[:, later] - hat[:, later]) @ feedback[later, now]
        for r in range(m // td):
            states = quantize(target[r * td : (r + 1) * td].reshape(-1), lut, K)
            hat[r * td : (r + 1) * td, now] = lut[states].reshape(td, td)
            packed[r, k] = pack_trellis(states, K, L)
    words = np.array([[packed[r, k] for k in range(n // td)] for r in range(m // td)])
    return hat * wscale, words, wscale
