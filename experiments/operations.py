"""What a JAX function takes, read off its jaxpr: operations, bytes moved, memory for intermediates.

Nothing is computed and no array is made: shapes suffice. Products are counted apart from the rest,
because they run at the machine's product rate and everything else at the speed of its memory. Loops
count their length times; a loop of unknown length counts once, so a method that has one is
underestimated. Elementwise chains are taken as fused, as XLA does: what only they read and write
needs no memory of its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

BALANCE = 8.0  # operations per byte below which a product waits for memory, as X @ vector does
# What is called without a boundary of its own, and the name of the jaxpr it holds.
CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
         "custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr"}  # fmt: skip
VIEWS = {"reshape", "squeeze", "expand_dims", "copy", "stop_gradient"}  # no new numbers
# Operations on an n × n matrix, in n³: Golub and Van Loan, Matrix Computations, 4th edition.
FACTORIZATIONS = {"cholesky": 1 / 3, "lu": 2 / 3, "eigh": 9.0, "qr": 4 / 3, "svd": 22.0,
                  "geqrf": 4 / 3, "householder_product": 4 / 3}  # fmt: skip
# Whose operands and results are whole arrays in memory. All else is fused into its reader.
WHOLE = {"dot_general", "conv_general_dilated", "sort", "gather", "scatter", "scatter-add", "scan",
         "while", "cond", "triangular_solve", "concatenate", "cumsum", "cumlogsumexp", "cumprod",
         "fft", "top_k", "optimization_barrier", "dynamic_update_slice",
         *FACTORIZATIONS}  # fmt: skip


class Work(NamedTuple):
    """Of one call."""

    products: float = 0.0  # floating-point operations of matrix products and factorizations
    others: float = 0.0  # of products that wait for memory, and one for each number of any result
    moved: float = 0.0  # bytes that operations limited by memory write, or read where more
    temporaries: int = 0  # the most bytes that intermediates and results hold at once
    results: int = 0  # bytes of the results that are not arguments handed on
    equations: int = 0  # of the program: what a compiler's time grows with

    @property
    def operations(self) -> float:
        return self.products + self.others

    def times(self, n: float | int) -> "Work":
        """Of n calls, one after another."""
        return self._replace(
            products=n * self.products, others=n * self.others, moved=n * self.moved
        )

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        """Of this call and then another."""
        return Work(
            self.products + other.products,
            self.others + other.others,
            self.moved + other.moved,
            max(self.temporaries, other.temporaries),
            max(self.results, other.results),
            self.equations + other.equations,
        )


class Step(NamedTuple):
    """One equation with calls expanded: values are numbered through, constants left out."""

    name: str
    reads: list[int]
    writes: dict[int, int]  # bytes of each result
    inner: int  # bytes that the equation holds inside while it runs


def work(f: Callable[..., Any], *shapes: Any, **static: Any) -> Work:
    """Of `f` on arguments of these shapes (arrays, ShapeDtypeStructs or pytrees of them).

    Of a jitted function, what it is traced to is what a later call of the same shapes finds.
    """
    jitted = f if hasattr(f, "trace") else jax.jit(f)
    return _work(jitted.trace(*shapes, **static).jaxpr.jaxpr)


def size(tree: Any) -> int:
    """Bytes of a pytree of arrays or shapes."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _work(jaxpr: Any) -> Work:
    total, steps = Work(), list[Step]()
    numbers, names = _Numbers(), dict[Any, int]()
    for equation, reads, writes in _expanded(jaxpr, numbers, names):
        found = _equation(equation)
        total += found
        results = {n: _bytes(v.aval) for n, v in zip(writes, equation.outvars, strict=True)}
        steps.append(Step(equation.primitive.name, reads, results, found.temporaries))
    given = {names[v] for v in jaxpr.invars if v in names}
    outputs = {numbers.of(v, names): _bytes(v.aval) for v in jaxpr.outvars}
    new = sum(held for number, held in outputs.items() if number not in given)
    return total._replace(temporaries=_peak(steps, set(outputs)), results=new)


class _Numbers:
    """Numbers values through: what a call or a new view only renames keeps its number."""

    def __init__(self) -> None:
        self.count = 0

    def new(self) -> int:
        self.count += 1
        return self.count

    def of(self, variable: Any, names: dict[Any, int]) -> int:
        """A literal is a value of its own."""
        if isinstance(variable, core.Literal):
            return self.new()
        if variable not in names:
            names[variable] = self.new()
        return names[variable]


def _expanded(
    jaxpr: Any, numbers: _Numbers, names: dict[Any, int]
) -> Iterator[tuple[Any, Any, Any]]:
    """Every equation with the numbers of what it reads and writes; calls are entered.

    names: the number of each of this jaxpr's variables; filled as they appear.
    """
    for equation in jaxpr.eqns:
        reads = [numbers.of(v, names) for v in equation.invars]
        if equation.primitive.name in VIEWS or _is_matrix_transpose(equation):
            names[equation.outvars[0]] = reads[0]
        elif (called := _called(equation)) is not None:
            inner, given = called, reads[len(reads) - len(called.invars) :]
            local = dict(zip(inner.invars, given, strict=True))
            yield from _expanded(inner, numbers, local)
            for outer, v in zip(equation.outvars, inner.outvars, strict=True):
                names[outer] = numbers.of(v, local)
        else:
            names |= {v: numbers.new() for v in equation.outvars}
            yield equation, reads, [names[v] for v in equation.outvars]


def _is_matrix_transpose(equation: Any) -> bool:
    """Which a product reads as it lies; more axes are copied into order."""
    return equation.primitive.name == "transpose" and equation.params["permutation"] == (1, 0)


def _called(equation: Any) -> Any:
    """The jaxpr that an equation runs once, or None: a call, or one platform's branch."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        return getattr(params[CALLS[name]], "jaxpr", params[CALLS[name]])
    platforms = params.get("branches_platforms") if name == "cond" else None
    if platforms is None:
        return None
    here = jax.default_backend()
    chosen = [n for n, p in enumerate(platforms) if p is None or here in p][0]
    return params["branches"][chosen].jaxpr


def _equation(equation: Any) -> Work:
    """The work of one equation; what loops and branches hold is entered."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _work(params["jaxpr"].jaxpr).times(params["length"])
    if name == "while":
        return _work(params["cond_jaxpr"].jaxpr) + _work(params["body_jaxpr"].jaxpr)
    if name == "cond":
        return max(map(_work, (b.jaxpr for b in params["branches"])), key=lambda w: w.operations)
    read = sum(_bytes(v.aval) for v in equation.invars)
    written = sum(_bytes(v.aval) for v in equation.outvars)
    numbers = sum(_count(v.aval) for v in equation.outvars)
    products = _products(equation)
    if not products:
        return Work(0.0, float(numbers), float(written), equations=1)
    if products < BALANCE * (read + written):
        return Work(0.0, products, float(read + written), equations=1)
    return Work(products, equations=1)


def _products(equation: Any) -> float:
    """Operations of a matrix product or factorization; 0 for any other equation."""
    name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        inner = math.prod(shapes[0][d] for d in contracted)
        return 2.0 * inner * _count(equation.outvars[0].aval)
    if name == "triangular_solve":
        return float(shapes[0][-1] * math.prod(shapes[1]))
    if name in FACTORIZATIONS:
        *batch, m, n = shapes[0]
        return FACTORIZATIONS[name] * math.prod(batch) * max(m, n) * min(m, n) ** 2
    return 0.0


def _peak(steps: Sequence[Step], outputs: set[int]) -> int:
    """The most bytes held at once, in program order; fused values hold none."""
    last, whole = dict[int, int](), set(outputs)
    for at, step in enumerate(steps):
        for value in step.reads:
            last[value] = at
        if step.name in WHOLE:
            whole |= {*step.reads, *step.writes}
    most, alive = 0, dict[int, int]()
    for at, step in enumerate(steps):
        alive |= {n: b for n, b in step.writes.items() if n in whole}
        most = max(most, sum(alive.values()) + step.inner)
        done = [n for n in alive if n not in outputs and last.get(n, at) <= at]
        for n in done:
            del alive[n]
    return most


def _bytes(x: Any) -> int:
    dtype = getattr(x, "dtype", None)
    return _count(x) * getattr(dtype, "itemsize", 0)


def _count(x: Any) -> int:
    return math.prod(getattr(x, "shape", ()))
