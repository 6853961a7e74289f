"""A slow NumPy port of bitsandbytes' 8-bit AdamW, the oracle of test_eight_bit.py, in float32 as
there.

Source: github.com/bitsandbytes-foundation/bitsandbytes at commit 95f9af3 (MIT):
`create_dynamic_map` of functional.py, with torch.linspace written out, and
`kOptimizerStatic8bit2StateBlockwise` of csrc/kernels.cu, of Adam without weight decay, whose search
for the nearest entry is that of `quantize_blockwise` in backends/default/ops.py.
"""

import numpy as np

F = np.float32
BLOCK = 256


def linspace(start, end, n):
    """In float32, from both ends to the middle."""
    step = (F(end) - F(start)) / F(n - 1)
    i = np.arange(n)
    up, down = F(start) + step * i.astype(F), F(end) - step * (n - 1 - i).astype(F)
    return np.where(i < n // 2, up, down).astype(F)


def create_dynamic_map(signed):
    data = []
    for i in range(7):
        items = 2**i + 1 if signed else 2 ** (i + 1) + 1
        boundaries = linspace(0.1, 1, items)
        means = (boundaries[:-1] + boundaries[1:]) / F(2)
        data += list(F(10.0 ** (-6 + i)) * means)
        if signed:
            data += list(-F(10.0 ** (-6 + i)) * means)
    data += [0.0, 1.0]
    assert len(data) == 256
    return np.array(sorted(data), F)


def quantize(x, code, signed):
    """Codes and the largest magnitude of each block; the sign of what is negative is kept."""
    codes, absmax = np.zeros(x.size, np.uint8), []
    for start in range(0, x.size, BLOCK):
        block = x[start : start + BLOCK]
        top = np.abs(block).max()
        absmax.append(top)
        bounds = (code[:-1] + code[1:]) / F(2)
        q = np.searchsorted(bounds, block / top if top else block)
        if signed:
            flipped = np.signbit(code[q]) != (block < 0)
            q = np.where(flipped, np.where(block > 0, q + 1, q - 1), q)
        codes[start : start + BLOCK] = q
    return codes, np.array(absmax, F)


def dequantize(codes, absmax, code):
    return code[codes] * np.repeat(absmax, BLOCK)[: codes.size]


class Adam8bit:
    def __init__(self, p, *, lr, b1, b2, eps=1e-8):
        self.p, self.lr, self.b1, self.b2, self.eps, self.t = p.astype(F), F(lr), b1, b2, F(eps), 0
        self.maps = create_dynamic_map(True), create_dynamic_map(False)
        blocks = -(-p.size // BLOCK)
        self.states = [(np.zeros(p.size, np.uint8), np.zeros(blocks, F)) for _ in range(2)]

    def step(self, g):
        self.t += 1
        m, v = (dequantize(*s, code) for s, code in zip(self.states, self.maps, strict=True))
        m = F(self.b1) * m + F(1 - self.b1) * g
        v = F(self.b2) * v + F(1 - self.b2) * g * g
        c1, c2 = F(1 - self.b1**self.t), F(np.sqrt(1 - self.b2**self.t))
        self.p = self.p - self.lr * c2 / c1 * (m / (np.sqrt(v) + c2 * self.eps))
        self.states = [quantize(m, self.maps[0], True), quantize(v, self.maps[1], False)]
        return self.p
