"""Who else takes part when a module is called."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as every

_FSDP = "torch.distributed.fsdp"


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the one that FSDP2 puts in front of it."""
    kind = type(module)
    return kind.__bases__[-1] if kind.__module__.startswith(_FSDP) else kind


def sharded(module: nn.Module) -> bool:
    """Whether FSDP2, and nobody else, takes part when the module is called: its parameters are there only then."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if hooked_everywhere() or _is_replaced(module):
        return False
    return bool(hooks) and all(str(hook.__module__).startswith(_FSDP) for hook in hooks)


def hooked(module: nn.Module) -> bool:
    """Whether something beside the module's own forward runs when it is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or _is_replaced(module) or hooked_everywhere()


def hooked_everywhere() -> bool:
    """Whether hooks see every module's call or backward, as `torch.nn.modules.module` registers them."""
    forward = every._global_forward_hooks or every._global_forward_pre_hooks
    return bool(forward or every._global_backward_hooks or every._global_backward_pre_hooks)


def _is_replaced(module: nn.Module) -> bool:
    return "forward" in vars(module) or hasattr(module, "parametrizations")
