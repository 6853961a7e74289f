"""The cross-entropy of a linear layer's outputs, which are never held all at once."""

from kernels.linear_cross_entropy.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels.linear_cross_entropy.api import linear_cross_entropy as linear_cross_entropy
from kernels.linear_cross_entropy.api import (
    linear_cross_entropy_and_logsumexp as linear_cross_entropy_and_logsumexp,
)
