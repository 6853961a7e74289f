"""GPTQ's loop over the columns of one block."""

from kernels.gptq_block.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.gptq_block.api import gptq_block as gptq_block
from kernels.gptq_block.grids import UNROUNDED as UNROUNDED
from kernels.gptq_block.grids import Functions as Functions
from kernels.gptq_block.grids import Integers as Integers
