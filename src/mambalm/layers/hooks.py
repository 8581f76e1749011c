"""Who else takes part when a module is called."""

from __future__ import annotations

from torch import nn


def hooked(module: nn.Module) -> bool:
    """Whether something beside the module's own forward runs when it is called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or hasattr(module, "parametrizations")
