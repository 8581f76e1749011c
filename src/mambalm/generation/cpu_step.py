"""One token of each of a few sequences on a CPU, as a list of jobs on memory that this step owns.

What `model(tokens, cache=state)` computes, without what it costs around the mathematics: each job is a kernel of
the ops' CPU backends on fixed buffers, and a team of threads goes through the list. A projection is a job where its
weight is read as it is (`nn.Linear` without hooks, `QuantizedLinear`); any other, such as a LoRA's, is called as the
module that it is, between two lists. Activations are float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambalm.layers.hooks import hooked
from mambalm.layers.mamba import PLAIN_PROJECTIONS, Mamba, full_precision
from mambalm.layers.mamba2 import Mamba2
from mambalm.layers.norm import RMSNorm
from mambalm.layers.state import MambaState, State
from mambalm.ops import backends
from mambalm.quantization.linear import QuantizedLinear

if TYPE_CHECKING:
    from mambalm.models.common import MambalmForCausalLM
    from mambalm.ops.numba_team import Job, Team

_HALF = (torch.bfloat16, torch.float16)
# Rows that share one reading of the weights; more are the business of matrix products.
MOST_ROWS = 4


def refusal(model: MambalmForCausalLM) -> str | None:
    """Why a model has no such step; None if it has."""
    if backends.requested(None) not in ("", "cpu"):
        return "another backend is asked for"
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}"
    if model.dtype not in (torch.float32, *_HALF):
        return f"the model is {model.dtype}"
    if any(map(hooked, (model, model.backbone, model.backbone.norm_f))):
        return "a module has hooks"
    blocks: Any = model.backbone.layers
    return next((reason for block in blocks if (reason := _block_refusal(block)) is not None), None)


def _block_refusal(block: Any) -> str | None:
    mixer = block.mixer
    kind = type(mixer)
    if kind not in (Mamba, Mamba2) or block.mlp is not None or type(block.norm) is not RMSNorm:
        return f"a layer is more than a norm and a Mamba or Mamba-2 layer: {kind.__name__}"
    if mixer.backend not in (None, "cpu") or (kind is Mamba2 and mixer.d_ssm != mixer.d_inner):
        return "a layer asks for another backend, or has an MLP inside"
    inner = getattr(mixer, "norm", None)
    if any(hooked(module) for module in (block, mixer, mixer.conv1d, block.norm, inner) if module is not None):
        return "a module has hooks"
    return None


class CPUStep:
    """Reads a token per row, again and again; `state` is what was read.

    Args:
        model: `refusal(model)` is None. Its weights are read where they are: they must not be replaced meanwhile.
        state: of the rows; it is copied.
    """

    def __init__(self, model: MambalmForCausalLM, state: State) -> None:
        from mambalm.ops.numba_team import Team

        self._embeddings = model.get_input_embeddings()
        self._team = Team()
        self._position = state.position.clone()
        hidden = model.config.hidden_size
        rows = state.batch_size
        self._stream = torch.zeros(rows, hidden)
        plan = _Plan()
        blocks: Any = model.backbone.layers
        self._layers = [
            (_Mamba if isinstance(block.mixer, Mamba) else _Mamba2)(plan, block, self._stream, before)
            for block, before in zip(blocks, state.layers, strict=True)
        ]
        self._logits = torch.zeros(rows, model.config.vocab_size)
        norm: Any = model.backbone.norm_f
        plan.project(model.lm_head, plan.norm(norm, self._stream), self._logits)
        self._runs = plan.runs()

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read a token per row (b); the logits after it (b, v) float32, overwritten by the next call."""
        self._stream.copy_(self._embeddings(tokens))
        for run in self._runs:
            run(self._team)
        self._position += 1
        return self._logits

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Let row i be what row `rows[i]` was."""
        self._position = self._position[rows]
        for layer in self._layers:
            for state in layer.states():
                state.copy_(state[rows])

    def state(self) -> State:
        """A copy of what was read, as the model takes it."""
        return State(tuple(layer.state() for layer in self._layers), self._position.clone())


class _Plan:
    """Jobs in order, with module calls between them."""

    def __init__(self) -> None:
        self._steps: list[Job | Callable[[Team], None]] = []

    def add(self, *jobs: Job) -> None:
        self._steps.extend(jobs)

    def norm(self, norm: RMSNorm, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """The normalised x (b, d)."""
        y = torch.zeros(x.shape)
        self._norm(x, norm.weight, y, norm.eps, gate, norm.group_size or 0)
        return y

    def norm_in_place(self, x: Tensor, eps: float) -> None:
        """Normalise x (b, d) without a weight."""
        self._norm(x, None, x, eps, None, 0)

    def _norm(self, x: Tensor, weight: Tensor | None, y: Tensor, eps: float, gate: Tensor | None, size: int) -> None:
        from mambalm.ops import numba_steps

        self.add(numba_steps.norm(x, None if weight is None else _vector(weight), y, eps, gate, size))

    def project(self, module: Any, x: Tensor, y: Tensor, *, added: bool = False) -> None:
        """y (b, out) = module(x), or added to y."""
        from mambalm.quantization import products

        if type(module) is QuantizedLinear and not hooked(module):
            self.add(*products.packed(module.packed, module.bias, x, y, added=added))
        elif type(module) in PLAIN_PROJECTIONS and not hooked(module) and not products.refuses(module.weight):
            # The step projection leaves this to the scan.
            bias = None if getattr(module, "scan_bias", None) is not None else module.bias
            self.add(*products.plain(module.weight, bias, x, y, added=added))
        else:
            self._steps.append(_module_call(module, x, y, added))

    def runs(self) -> list[Callable[[Team], None]]:
        """The steps, each list of jobs between module calls as one."""
        from mambalm.ops.numba_team import Job, JobList

        runs: list[Callable[[Team], None]] = []
        jobs: list[Job] = []

        def close() -> None:
            if jobs:
                runs.append(JobList(jobs).run)
                jobs.clear()

        for step in self._steps:
            if isinstance(step, Job):
                jobs.append(step)
            else:
                close()
                runs.append(step)
        close()
        return runs


def _module_call(module: nn.Module, x: Tensor, y: Tensor, added: bool) -> Callable[[Team], None]:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def call(team: Team) -> None:
        out = module(x.to(dtype)[:, None])[:, 0]
        if added:
            y.add_(out)
        else:
            y.copy_(out)

    return call


class _Convolution:
    """The convolution of a layer: its buffer of past inputs, and its output."""

    def __init__(self, plan: _Plan, conv: Any, x: Tensor, before: Tensor) -> None:
        from mambalm.ops import numba_steps

        self._dtype = before.dtype
        self.kept = before.mT.float().contiguous()
        self.y = torch.zeros(x.shape)
        bias = torch.zeros(x.shape[1]) if conv.bias is None else _vector(conv.bias)
        weight = _vector(conv.weight.squeeze(1).T)
        plan.add(numba_steps.conv_silu(x, self.kept, weight, bias, self.y))

    def state(self) -> Tensor:
        """(b, d, k - 1)"""
        return self.kept.mT.to(self._dtype, memory_format=torch.contiguous_format, copy=True)


class _Mamba:
    """A block with a Mamba layer."""

    def __init__(self, plan: _Plan, block: Any, stream: Tensor, before: Any) -> None:
        from mambalm.ops import numba_steps

        mixer: Any = block.mixer
        d, n, rank = mixer.d_inner, mixer.d_state, mixer.dt_rank
        inner, low, step, y = (torch.zeros(len(stream), size) for size in (2 * d, rank + 2 * n, d, d))
        u, z = inner.split(d, 1)
        delta, B, C = low.split([rank, n, n], 1)
        plan.project(mixer.in_proj, plan.norm(block.norm, stream), inner)
        self._conv = _Convolution(plan, mixer.conv1d, u, before.conv)
        plan.project(mixer.x_proj, self._conv.y, low)
        if mixer.bcdt_rms_eps is not None:
            for part in (delta, B, C):
                plan.norm_in_place(part, mixer.bcdt_rms_eps)
        plan.project(mixer.dt_proj, delta, step)
        self._scan = numba_steps.ScanState(-full_precision(mixer.A_log.detach()).exp(), len(stream))
        self._scan.write(before.ssm)
        bias = mixer._scan_bias()
        bias = torch.zeros(d) if bias is None else _vector(bias)
        plan.add(numba_steps.selective_scan(self._conv.y, step, B, C, _vector(mixer.D), z, bias, y, self._scan))
        plan.project(mixer.out_proj, y, stream, added=True)

    def state(self) -> MambaState:
        return MambaState(self._conv.state(), self._scan.read())

    def states(self) -> tuple[Tensor, Tensor]:
        """What is kept, the rows first."""
        return self._conv.kept, self._scan.states


class _Mamba2:
    """A block with a Mamba-2 layer."""

    def __init__(self, plan: _Plan, block: Any, stream: Tensor, before: Any) -> None:
        from mambalm.ops import numba_steps

        mixer: Any = block.mixer
        inner, y = (torch.zeros(len(stream), size) for size in (mixer.in_proj.out_features, mixer.d_ssm))
        _, _, z, xBC, dt = inner.split(mixer._split, 1)
        plan.project(mixer.in_proj, plan.norm(block.norm, stream), inner)
        self._conv = _Convolution(plan, mixer.conv1d, xBC, before.conv)
        u, B, C = self._conv.y.split(mixer._split_conv, 1)
        self._ssm = before.ssm.float().clone(memory_format=torch.contiguous_format)
        A, bias = _vector(-full_precision(mixer.A_log.detach()).exp()), _vector(mixer.dt_bias)
        D = _vector(mixer.D).expand(mixer.headdim, -1).T.flatten() if not mixer.D_has_hdim else _vector(mixer.D)
        gate = z if mixer.norm is None else None
        plan.add(numba_steps.ssd(u, dt, A, B, C, D.contiguous(), bias, y, self._ssm, gate, mixer.dt_limit))
        if mixer.norm is not None:
            y = plan.norm(mixer.norm, y, z)
        plan.project(mixer.out_proj, y, stream, added=True)

    def state(self) -> MambaState:
        return MambaState(self._conv.state(), self._ssm.clone())

    def states(self) -> tuple[Tensor, Tensor]:
        """What is kept, the rows first."""
        return self._conv.kept, self._ssm


def _vector(parameter: Tensor) -> Tensor:
    return parameter.detach().float().contiguous()
