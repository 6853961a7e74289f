"""Compressed weights: pytrees that know their dense form and what they cost to store."""

from algorithms.tensors.base import CompressedTensor as CompressedTensor
from algorithms.tensors.block_sparse import BlockSparseTensor as BlockSparseTensor
from algorithms.tensors.block_sparse import filled as filled
from algorithms.tensors.codebook import CodebookTensor as CodebookTensor
from algorithms.tensors.dense import DenseTensor as DenseTensor
from algorithms.tensors.experts import ExpertsTensor as ExpertsTensor
from algorithms.tensors.lattice import LatticeTensor as LatticeTensor
from algorithms.tensors.low_rank import LowRankTensor as LowRankTensor
from algorithms.tensors.low_rank import SumTensor as SumTensor
from algorithms.tensors.quantized import QuantizedTensor as QuantizedTensor
from algorithms.tensors.quantized_input import QuantizedInput as QuantizedInput
from algorithms.tensors.rotated import RotatedTensor as RotatedTensor
from algorithms.tensors.sparse import SparseTensor as SparseTensor
from algorithms.tensors.trellis import TrellisTensor as TrellisTensor
