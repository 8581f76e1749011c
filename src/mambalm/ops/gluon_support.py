"""What the backends in Gluon share: when they can run, and what differs between versions of Triton's lower level."""

from collections.abc import Callable

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["barrier", "copy_in", "copy_out", "gl", "gluon", "unsupported", "view"]

# The left names are those of 3.9, the right ones those of 3.6.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@builtin
def view(memory, shape, layout, _semantic=None):  # type: ignore[no-untyped-def]
    """The same shared memory under another shape and layout (``_reinterpret`` in 3.6, ``reinterpret`` in 3.9)."""
    shape = [_unwrap_if_constexpr(size) for size in _unwrap_if_constexpr(shape)]
    return _semantic.memdesc_reinterpret(memory, memory.dtype, shape, _unwrap_if_constexpr(layout))


@builtin
def barrier(_semantic=None):  # type: ignore[no-untyped-def]
    """All threads of a program wait for each other (``thread_barrier`` in 3.6, ``barrier`` in 3.9)."""
    return _semantic.debug_barrier()


def unsupported(device: torch.device, suits: Callable[[tuple[int, int]], bool], wanted: str) -> str | None:
    """Why no Gluon kernel can run on a device: none here, or a GPU whose compute capability does not suit; or None."""
    if triton.knobs.runtime.interpret:
        return "Gluon does not run in Triton's interpreter"
    if torch.version.hip is not None or device.type != "cuda" or not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    if not suits(torch.cuda.get_device_capability(device)):
        return f"it needs an NVIDIA GPU of compute capability {wanted}"
    return None
