"""Sparse training around any optimizer, one file per paper."""
