"""A slow NumPy float64 port of LoftQ's initialization, the oracle of test_loftq.py.

Source: github.com/yxli2123/LoftQ at commit ae33fd4 (MIT): `quant_first_iter` and
`low_rank_decomposition` in glue/utils.py, `quant_nf4_block` and `create_normal_map` in
glue/utils_qaunt.py.
"""

import numpy as np
from scipy.stats import norm


def create_normal_map(offset: float = 0.9677083, num_bits: int = 4):
    variations = 2**num_bits
    below = norm.ppf(np.linspace(offset, 0.5, variations // 2 + 1)[:-1])
    above = -norm.ppf(np.linspace(offset, 0.5, variations // 2)[:-1])
    values = np.sort(np.concatenate([below, [0], above]))
    return values / values.max()


def quant_nf4_block(weight, block_size: int):
    levels, blocks = create_normal_map(), weight.reshape(-1, block_size)
    size = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / size)[..., None] - levels).argmin(-1)
    return (levels[nearest] * size).reshape(weight.shape)


def low_rank_decomposition(weight, rank: int):
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * vh[:rank]


def loftq(weight, rank: int, block_size: int, num_iter: int):
    """The dense form of the quantized weight, L and R."""
    product = 0
    for _ in range(num_iter):
        quantized = quant_nf4_block(weight - product, block_size)
        left, right = low_rank_decomposition(weight - quantized, rank)
        product = left @ right
    return quantized, left, right
