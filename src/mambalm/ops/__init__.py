"""Functions on tensors: the state-space operators, each with a state in and a state out, on every backend.

Each is differentiable once: by autograd, in `torch.compile` as one graph, and under `torch.func`'s grad and vmap, which
runs it for one row after another. Second derivatives and forward mode raise NotImplementedError; the reference, which
all but the loss have as a backend, is plain torch and takes both.
"""

from mambalm.ops.backends import BackendError, SlowBackendWarning, explain
from mambalm.ops.backends import use as use_backend
from mambalm.ops.causal_conv1d import causal_conv1d
from mambalm.ops.linear_cross_entropy import linear_cross_entropy
from mambalm.ops.rms_norm import rms_norm
from mambalm.ops.selective_scan import selective_scan
from mambalm.ops.ssd import ssd

__all__ = [
    "BackendError",
    "SlowBackendWarning",
    "causal_conv1d",
    "explain",
    "linear_cross_entropy",
    "rms_norm",
    "selective_scan",
    "ssd",
    "use_backend",
]
