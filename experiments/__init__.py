import os

# jaxlib's LAPACK threads fight XLA's own for the cores: a Cholesky takes milliseconds with one
# thread and can take seconds with several. Read when the library loads, so set before jax.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
