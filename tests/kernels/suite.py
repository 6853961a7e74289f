"""The tests that every operation passes, in four tiers.

T0 every implementation that runs anywhere against the reference in float64; T1 the kernel in
Mosaic's interpreter, on small arguments; T2 the kernel compiled for an H200 on real shapes, without
one; T3 the kernel on a Hopper GPU.

An operation's test class derives from one of the suites, fills in the workloads, and adds what is
its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import aot, dispatch
from kernels import workload as workloads
from kernels.linear_cross_entropy.shapes import GIGABYTE
from kernels.workload import Workload, shapes, widened

KEY = 7


def pytest_cases(metafunc):
    """Parametrize `name` by a class's workloads: of the attribute that the test's mark names."""
    mark = metafunc.definition.get_closest_marker("workloads")
    if mark is not None:
        cases = getattr(metafunc.cls, mark.args[0])
        metafunc.parametrize("workload", list(cases.values()), ids=list(cases))


class Suite:
    """T0, of an operation that has no kernel."""

    everywhere: dict[str, Workload] = {}  # odd tails, dtypes, extreme values
    implementations = ("reference", "xla")

    @pytest.mark.workloads("everywhere")
    @pytest.mark.some(8)
    def test_it_agrees_with_float64(self, workload):
        for implementation in self.implementations:
            close(workload, implementation)


class Differentiable(Suite):
    """With its gradients."""

    by: tuple[int, ...]  # arguments that it is differentiated by

    @pytest.mark.workloads("everywhere")
    @pytest.mark.some(6)
    def test_gradients_agree_with_float64(self, workload):
        for implementation in self.implementations:
            close_gradients(workload, implementation, self.by)


class KernelSuite(Suite):
    """All four, of an operation with a kernel."""

    small: dict[str, Workload]  # what the kernel takes, at most 16 steps of K in all
    real: dict[str, Workload]

    @pytest.mark.workloads("small")
    @pytest.mark.some(4)
    def test_the_kernel_agrees_with_float64_when_interpreted(self, workload):
        close(workload, "interpret")

    @pytest.mark.aot
    @pytest.mark.workloads("real")
    def test_the_kernel_compiles_for_an_h200_without_spills(self, workload):
        arguments = shapes(workload)
        program = aot.compile(lambda *a: workload.run(*a, implementation="mosaic"), *arguments)
        assert program.kernels, "there is no Mosaic kernel in it"
        assert all(kernel.spilled == 0 for kernel in program.kernels), program.kernels
        if workload.temporary is not None:
            assert program.temporary <= workload.temporary

    @pytest.mark.aot
    @pytest.mark.workloads("small")
    def test_what_the_interpreter_takes_the_compiler_does(self, workload):
        arguments = shapes(workload)
        assert aot.compile(lambda *a: workload.run(*a, implementation="mosaic"), *arguments).kernels

    @pytest.mark.gpu
    @pytest.mark.workloads("small")
    def test_the_kernel_agrees_with_float64_on_a_gpu(self, workload):
        close(workload, "mosaic")

    @pytest.mark.gpu
    @pytest.mark.workloads("real")
    def test_the_kernel_agrees_with_the_xla_form_on_real_shapes(self, workload):
        arguments = jax.jit(workload.arguments)(jax.random.key(KEY))
        found, expected = (
            jax.jit(lambda *a, i=i: workload.run(*a, implementation=i))(*arguments)
            for i in ("mosaic", "xla")
        )
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert distance(ours, theirs) < 2 * workload.tolerance
        again = jax.jit(lambda *a: workload.run(*a, implementation="mosaic"))(*arguments)
        for ours, same in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(ours, same)  # what moves is a race


class DifferentiableKernelSuite(KernelSuite, Differentiable):
    """All four, with gradients."""

    @pytest.mark.workloads("small")
    @pytest.mark.some(2)
    def test_gradients_of_the_kernel_agree_with_float64_when_interpreted(self, workload):
        close_gradients(workload, "interpret", self.by)


class LinearLossSuite(DifferentiableKernelSuite):
    """Of a loss behind a head, w[V, D] as its second argument, that never holds the logits."""

    @pytest.mark.aot
    @pytest.mark.workloads("real")
    def test_the_xla_form_holds_no_logits_either(self, workload):
        arrays = shapes(workload)
        program = aot.compile(lambda *a: workload.run(*a, implementation="xla"), *arrays)
        assert program.temporary <= GIGABYTE
        tokens, vocabulary = arrays[0].shape[0], arrays[1].shape[0]
        assert f"[{tokens},{vocabulary}]" not in program.text


def close(workload: Workload, implementation: str) -> None:
    arguments = workload.arguments(jax.random.key(KEY))
    found = jax.jit(lambda *a: workload.run(*a, implementation=implementation))(*arguments)
    expected = in_float64(workload, arguments)
    for ours, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.shape == exact.shape
        assert distance(ours, exact) < workload.tolerance, implementation


def close_gradients(workload: Workload, implementation: str, by: tuple[int, ...]) -> None:
    arguments = workload.arguments(jax.random.key(KEY))

    def total(implementation, *arguments):
        out = workload.run(*arguments, implementation=implementation)
        leaves = jax.tree.leaves(out)
        # Weighed, so that no cotangent is one that errors could cancel in.
        return sum((x * jnp.cos(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape))).sum()
                   for x in leaves)  # fmt: skip

    argnums = tuple(n + 1 for n in by)
    found = jax.jit(jax.grad(total, argnums), static_argnums=0)(implementation, *arguments)
    with jax.enable_x64(True):
        wide = widened(arguments)
        expected = jax.jit(jax.grad(total, argnums), static_argnums=0)("reference", *wide)
    for ours, exact in zip(found, expected, strict=True):
        assert distance(ours, exact) < 2 * workload.tolerance, implementation


def in_float64(workload: Workload, arguments):
    with jax.enable_x64(True):
        return jax.jit(lambda *a: workload.run(*a, implementation="reference"))(*widened(arguments))


def distance(found, exact) -> float:
    with jax.enable_x64(True):
        return float(workloads.distance(jnp.asarray(found), jnp.asarray(exact)))


def require_gpu() -> None:
    where = dispatch.device()
    if where.capability != dispatch.CAPABILITY:
        pytest.skip(f"needs a Hopper GPU (compute {dispatch.CAPABILITY}), and this is {where.kind}")
