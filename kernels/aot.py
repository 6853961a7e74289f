"""Compiling for an H200 on a machine that has none: what a kernel takes there, but not how long.

Needs JAX's CUDA plugin and NVIDIA's ptxas, but no GPU and no driver: `make test-aot` sets them up.
"""

import functools
import importlib.resources
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels import dispatch

TARGET = "h200.txtpb"  # an H200 as XLA describes devices; clocks and sizes of NVIDIA's data sheet


class Kernel(NamedTuple):
    """What ptxas says of a Mosaic kernel."""

    name: str
    registers: int  # of a thread
    spilled: int  # bytes of a thread, stored and loaded


class Program(NamedTuple):
    temporary: int  # bytes beside arguments and results
    text: str  # optimized HLO
    kernels: list[Kernel]  # Mosaic's; XLA's own are in `text`


def lacking() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    names = ("jax_plugins", "jax_plugins.xla_cuda13")  # to look for the second imports the first
    if not all(map(importlib.util.find_spec, names)):
        return "JAX's CUDA plugin is not installed: run `make test-aot`"
    return None


def compile(f: Callable[..., Any], *arguments: Any) -> Program:
    """Compile f for one H200. arguments: arrays, or pytrees of them, or what has their shapes and
    types; None where f takes none.
    """
    mesh = _mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments
    )
    with dispatch.compiling_for(mesh.devices.flat[0]), jax.set_mesh(mesh), _ptxas() as said:
        compiled = jax.jit(f).trace(*shapes).lower().compile()
        memory = compiled.memory_analysis()
        return Program(memory.temp_size_in_bytes, compiled.as_text(), _kernels(said))


@functools.cache
def _mesh() -> jax.sharding.Mesh:
    text = importlib.resources.files("kernels").joinpath(TARGET).read_text()
    found = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text)
    return jax.make_mesh((1,), ("x",), devices=found.devices, axis_types=(AxisType.Auto,))


class _ptxas:
    """A folder where Mosaic leaves what ptxas says, while the body runs."""

    def __enter__(self) -> Path:
        self._folder = tempfile.TemporaryDirectory(prefix="planish-ptxas-")
        self._before = os.environ.get("MOSAIC_GPU_DUMP_TO")
        os.environ["MOSAIC_GPU_DUMP_TO"] = self._folder.name
        return Path(self._folder.name)

    def __exit__(self, *_: Any) -> None:
        del os.environ["MOSAIC_GPU_DUMP_TO"]
        if self._before is not None:
            os.environ["MOSAIC_GPU_DUMP_TO"] = self._before
        self._folder.cleanup()


def _kernels(folder: Path) -> list[Kernel]:
    return [_kernel(path.stem, path.read_text()) for path in sorted(folder.glob("*.ptxas"))]


def _kernel(name: str, said: str) -> Kernel:
    return Kernel(
        name,
        max(_numbers(r"Used (\d+) registers", said)),
        sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", said)),
    )


def _numbers(pattern: str, text: str) -> Iterable[int]:
    return [int(number) for number in re.findall(pattern, text)]
