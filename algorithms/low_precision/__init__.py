"""Layers whose three products are of numbers of few bits, one file per paper."""
