"""x H / √n for every n that has a Hadamard matrix here."""

from kernels.hadamard.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.hadamard.api import hadamard as hadamard
from kernels.hadamard.matrices import factor as factor
from kernels.hadamard.matrices import hadamard_matrix as hadamard_matrix
from kernels.hadamard.matrices import largest_block as largest_block
