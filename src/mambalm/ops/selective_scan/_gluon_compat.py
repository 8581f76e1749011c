"""What differs between the versions of Gluon, Triton's lower level, whose interface still moves."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin

__all__ = ["barrier", "gl", "gluon", "view"]


@builtin
def view(memory, shape, layout, _semantic=None):  # type: ignore[no-untyped-def]
    """The same shared memory under another shape and layout (``_reinterpret`` in 3.6, ``reinterpret`` in 3.9)."""
    shape = [_unwrap_if_constexpr(size) for size in _unwrap_if_constexpr(shape)]
    return _semantic.memdesc_reinterpret(memory, memory.dtype, shape, _unwrap_if_constexpr(layout))


@builtin
def barrier(_semantic=None):  # type: ignore[no-untyped-def]
    """All threads of a program wait for each other (``thread_barrier`` in 3.6, ``barrier`` in 3.9)."""
    return _semantic.debug_barrier()
