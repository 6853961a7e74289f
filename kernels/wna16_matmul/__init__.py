"""x Wᵀ with W kept as packed codes (integers of 2 to 8 bits, FP4, NF4) and a scale per group."""

from kernels.wna16_matmul.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.wna16_matmul.api import wna16_matmul as wna16_matmul
