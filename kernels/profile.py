"""A kernel once, for a profiler: python -m kernels.profile wna16_matmul "8B gate_up, W4, M=16"

    ncu --set full --profile-from-start off python -m kernels.profile decode_attention

Arguments are made and programs compiled before the profiler is told to begin, so that it sees the
operation's kernels alone, in the order in which their shapes are printed.
"""

import argparse
import ctypes
import sys

import jax

from kernels import bench, dispatch
from kernels.timing import compiled


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", help="an operation")
    parser.add_argument("shape", nargs="?", help="one of its shapes")
    asked = parser.parse_args()
    todo, where = list(bench.selected(asked.op, asked.shape)), dispatch.device()
    if where.capability != dispatch.CAPABILITY:
        sys.exit(f"This is a {where.kind}: kernels run on GPUs of compute {dispatch.CAPABILITY}.")
    cuda = ctypes.CDLL("libcuda.so.1")
    for op, name, workload in todo:
        program = compiled(bench.forms(workload, where.platform)["mosaic"])
        arguments = program.make(jax.random.key(0))
        jax.block_until_ready(program.run(*arguments))
        print(op, name, flush=True)
        cuda.cuProfilerStart()
        jax.block_until_ready(program.run(*arguments))
        cuda.cuProfilerStop()


if __name__ == "__main__":
    main()
