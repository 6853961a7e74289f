"""xᵀ x, each off-diagonal product computed once."""

from kernels.gram.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.gram.api import gram as gram
