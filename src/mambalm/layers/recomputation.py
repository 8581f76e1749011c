"""Activations that cost more memory than the time it takes to compute them again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def _scans_are_kept(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    scan = op is torch.ops.mambalm.selective_scan.default
    return CheckpointPolicy.MUST_SAVE if scan else CheckpointPolicy.PREFER_RECOMPUTE


def keeping_scans(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, of which the backward computes all but the scans again instead of finding it kept.

    Random numbers (the dropout of an adapter) and autocast are as they were. torch.compile decides for itself what to
    keep, and without gradients nothing is kept anyway: the function is simply called then.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*arguments)
    contexts = partial(create_selective_checkpoint_contexts, _scans_are_kept)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)
