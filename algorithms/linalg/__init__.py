"""Linear algebra that several methods share: polar factors by Newton-Schulz iteration."""

from algorithms.linalg.polar import frobenius_norm as frobenius_norm
from algorithms.linalg.polar import polar_express as polar_express
from algorithms.linalg.polar import polar_factor as polar_factor
from algorithms.linalg.polar import quintics as quintics
