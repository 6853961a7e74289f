"""Weights that are kept, with little beside them that is learned, one file per paper."""
