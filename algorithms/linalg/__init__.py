"""Linear algebra that several methods share: polar factors, leading singular triples, Lanczos,
curvature and its spectrum, inverse roots. Conjugate gradients are `jax.scipy.sparse.linalg.cg`.
"""

from algorithms.linalg.curvature import gauss_newton_product as gauss_newton_product
from algorithms.linalg.curvature import hessian_product as hessian_product
from algorithms.linalg.krylov import eigenpairs as eigenpairs
from algorithms.linalg.krylov import lanczos as lanczos
from algorithms.linalg.krylov import quadrature as quadrature
from algorithms.linalg.polar import frobenius_norm as frobenius_norm
from algorithms.linalg.polar import polar_express as polar_express
from algorithms.linalg.polar import polar_factor as polar_factor
from algorithms.linalg.polar import quintics as quintics
from algorithms.linalg.roots import inverse_root as inverse_root
from algorithms.linalg.roots import newton_inverse_root as newton_inverse_root
from algorithms.linalg.stochastic import density as density
from algorithms.linalg.stochastic import diagonal as diagonal
from algorithms.linalg.stochastic import spectrum as spectrum
from algorithms.linalg.stochastic import trace as trace
from algorithms.linalg.svd import pca as pca
from algorithms.linalg.svd import randomized_eigh as randomized_eigh
from algorithms.linalg.svd import randomized_svd as randomized_svd
