"""Functions on tensors: the state-space operators, each with a state in and a state out, on every backend."""

from mambalm.ops.backends import BackendError, SlowBackendWarning, explain
from mambalm.ops.backends import use as use_backend
from mambalm.ops.selective_scan import selective_scan

__all__ = ["BackendError", "SlowBackendWarning", "explain", "selective_scan", "use_backend"]
