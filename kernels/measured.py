"""How many times as fast as the best XLA form each kernel was measured to be, by device kind,
operation and class of shapes. Written by `python -m experiments.survey` from what
`python -m kernels.bench` recorded; what is not here was not measured.
"""

TIMES_FASTER: dict[tuple[str, str, str], float] = {}
