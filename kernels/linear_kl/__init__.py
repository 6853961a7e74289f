"""Divergences between two linear layers' softmaxes, whose logits are never held all at once."""

from kernels.linear_kl.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.linear_kl.api import linear_kl as linear_kl
