"""Residual sum, RMSNorm, block rotation and rounding to 8 or 4 bits of each row, in one pass."""

from kernels.quantize_rows.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.quantize_rows.api import LARGEST as LARGEST
from kernels.quantize_rows.api import QuantizedRows as QuantizedRows
from kernels.quantize_rows.api import quantize_rows as quantize_rows
