"""Attention of one query token per sequence over a cache of keys and values kept as codes."""

from kernels.decode_attention.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.decode_attention.api import KINDS as KINDS
from kernels.decode_attention.api import decode_attention as decode_attention
