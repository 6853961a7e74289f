"""Compressed weights: pytrees that know their dense form and what they cost to store."""

from algorithms.tensors.base import CompressedTensor as CompressedTensor
from algorithms.tensors.quantized import QuantizedTensor as QuantizedTensor
