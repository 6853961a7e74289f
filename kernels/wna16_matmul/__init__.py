"""x Wᵀ with W kept as packed integer codes of 2 to 8 bits, a scale and a zero point per group."""

from kernels.wna16_matmul.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.wna16_matmul.api import wna16_matmul as wna16_matmul
