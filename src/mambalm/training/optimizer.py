"""AdamW with weight decay by parameter name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# The state-space parameters, wherever they stand: decay would pull A towards -1, D towards 0 and Δ towards softplus(0).
_STATE_SPACE = frozenset({"A_log", "D", "dt_bias"})
# Modules whose weights are gains or rows of a table. A table's rows of rare tokens get no gradient for many steps, in
# which decay would only shrink them; a head tied to the embeddings is the same parameter.
_UNDECAYED_MODULES = ("norm", "embedding", "conv1d")


def decays(name: str) -> bool:
    """Whether the parameter of this (dotted) name gets weight decay: the matrices of projections and untied heads do.

    A_log, D, every bias (that of Δ among them), norms, embeddings and the few taps of the convolution do not.
    """
    *modules, leaf = name.split(".")
    if leaf in _STATE_SPACE or leaf.endswith("bias"):
        return False
    return not any(part in module for module in modules for part in _UNDECAYED_MODULES)


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two groups for a torch optimizer, with and without weight decay, of the parameters that are trained."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (decayed if decays(name) else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def adamw(
    model: nn.Module,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """A fused AdamW over the model's trained parameters; the learning rate is the schedule's and is set every step."""
    groups = parameter_groups(model.named_parameters(), weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group of the optimizer this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def step_in_backward(optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
    """Let the backward step every parameter as soon as its gradient is there, and drop the gradient.

    So the gradients never lie in memory all at once: with AdamW's moments they are a quarter of what training keeps.
    The parameters become what one step after the backward would make of them. It is for loops without clipping by
    norm, accumulation and loss scaling, which all need every gradient first; they set the learning rate before the
    backward, and call neither `step` nor `zero_grad`. Removing the handles ends it.

    Raises:
        ValueError: a parameter is sharded, so that the backward has no whole gradient of it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(hasattr(parameter, "full_tensor") for parameter in parameters):
        raise ValueError("sharded parameters cannot be stepped in the backward: call optimizer.step() after it")

    def step(parameter: torch.Tensor) -> None:
        optimizer.step()  # of those that have a gradient, which is this one
        parameter.grad = None

    return [parameter.register_post_accumulate_grad_hook(step) for parameter in parameters if parameter.requires_grad]
