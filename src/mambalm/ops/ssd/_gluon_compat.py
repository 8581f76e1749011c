"""What differs between the versions of Gluon in the names of Hopper's copies and barriers."""

from triton.experimental.gluon.language.nvidia.hopper import tma

from mambalm.ops.selective_scan._gluon_compat import gl, gluon, view

__all__ = ["barrier", "copy_in", "copy_out", "gl", "gluon", "view"]

# The left names are those of 3.9, the right ones those of 3.6.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
