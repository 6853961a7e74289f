"""The public function: checks shapes, chooses an implementation."""

from jaxtyping import Array, Bool, Float, Int

from kernels import dispatch
from kernels.gptq_block import mosaic, reference, xla
from kernels.gptq_block.grids import Grid

IMPLEMENTATIONS = {
    "reference": reference.gptq_block,
    "xla": xla.gptq_block,
    "mosaic": mosaic.gptq_block,
}


def gptq_block(
    w: Float[Array, "*B c r"],
    u: Float[Array, "*B c c"],
    scale: Float[Array, "*B G r"],
    zero: Float[Array, "*B G r"],
    group: Int[Array, "*B c"],
    keep: Bool[Array, "*B c r"] | None = None,
    *,
    grid: Grid,
    implementation: str = "auto",
) -> tuple[Array, Float[Array, "*B c r"]]:
    """The codes of c columns of W and their errors e, as GPTQ goes through them:
    q_j = quant(w_j), e_j = (w_j - q_j) / U_jj, W <- W - e_j U_j,:.

    Columns are rows here, contiguous in memory, of r numbers each. u: the block of the inverse
    Hessian's upper factor; what is below its diagonal counts as 0. scale, zero: of each group and
    row; group: of each column. keep: where it is false, a number becomes 0, with the code 0, and
    all of it is an error. grid: `Integers(bits=…)`, whose codes [*B c r] are bytes, or any with
    `encode` and `decode`.
    implementation: see `kernels.dispatch`. Raises ValueError if it cannot run.
    """
    return dispatch.run(
        "gptq_block", IMPLEMENTATIONS, implementation, w, u, scale, zero, group, keep,
        lacks=mosaic.lacks(w, grid, keep), bucket=bucket(w.shape), grid=grid,
    )  # fmt: skip


def bucket(shape: tuple[int, ...]) -> str:
    """The class of shapes, in `kernels.measured`: columns, and how many rows there are in all."""
    *batch, c, r = shape
    for size in batch:
        r *= size
    rows = next((f"rows<={most}" for most in (4096, 16896, 65536) if r <= most), "rows>65536")
    return f"c={c}, {rows}"
