"""Weights of low rank, and corrections of low rank around any method, one file per paper."""
