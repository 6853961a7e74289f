"""How many times as fast as the best XLA form each kernel was measured to be, by device kind,
operation and class of shapes. Written by `python -m kernels.bench --render` from
`kernels/results/`; what is not here was not measured.
"""

TIMES_FASTER: dict[tuple[str, str, str], float] = {}
