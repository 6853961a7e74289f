"""x wᵀ of float8 with a scale for each 1 × 128 of x and each 128 × 128 of w."""

from kernels.fp8_block_matmul.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.fp8_block_matmul.api import fp8_block_matmul as fp8_block_matmul
