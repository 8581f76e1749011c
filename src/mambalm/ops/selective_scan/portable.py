"""The selective scan in plain torch, on any device: vectorised over chunks, memory bounded by a segment of the length.

A segment of the sequence is materialised at a time as (b, length, g, n, e), e = d / g channels of a group: n before
the channels, so that the innermost axis is long and C h is a batched matrix product. Only the state at the start of
each segment is kept for the backward, which computes the segment again.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype
from mambalm.ops.selective_scan.arguments import Arguments

# Elements of a materialised segment, and of one step over all of its chunks: on a CPU a segment should stay in cache,
# elsewhere a step should fill the device.
_SEGMENT_ELEMENTS = {"cpu": 1 << 20}
_STEP_ELEMENTS = {"cpu": 1 << 14}
_LONGEST_SEGMENT, _MOST_CHUNKS = 256, 16


def supports(call: Call) -> str | None:
    """It runs everywhere."""
    return None


def checkpoint_shape(call: Call) -> tuple[int, ...]:
    """One state per segment: (segments, b, g, n, e)."""
    b, l, d, n, g = (call.sizes[axis] for axis in "bldng")
    step, _ = _segment_length(b, d, n, call.device.type)
    return (-(-l // step), b, g, n, d // g)


def _segment_length(b: int, d: int, n: int, device_type: str) -> tuple[int, int]:
    """Steps of a segment and the number of chunks that it is scanned in side by side."""
    row = max(b * d * n, 1)
    chunks = min(max(_STEP_ELEMENTS.get(device_type, 1 << 20) // row, 1), _MOST_CHUNKS)
    length = min(max(_SEGMENT_ELEMENTS.get(device_type, 1 << 26) // row, 16), _LONGEST_SEGMENT)
    return -(-length // chunks) * chunks, chunks


@dataclass(frozen=True)
class _Documents:
    """The packed documents that touch a segment; positions are relative to the segment."""

    starts: Tensor  # positions at which a document starts
    started: Tensor  # the documents that start there
    ends: Tensor  # the last positions of documents
    ended: Tensor  # the documents that end there


def _documents(cu_seqlens: Tensor, begin: int, end: int) -> _Documents:
    first, past = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    filled = past > first
    started = (filled & (first >= begin) & (first < end)).nonzero()[:, 0]
    ended = (filled & (past > begin) & (past <= end)).nonzero()[:, 0]
    return _Documents(first[started] - begin, started, past[ended] - 1 - begin, ended)


@dataclass
class _Scan:
    """The arguments, A and the initial state in the segment layout, and what a segment needs of them."""

    given: Arguments
    A: Tensor  # (g, n, e)
    initial: Tensor | None  # (b or s, g, n, e)
    length: int
    chunks: int

    def segments(self) -> Iterator[tuple[int, int]]:
        return ((i, min(i + self.length, self.given.u.shape[1])) for i in range(0, self.given.u.shape[1], self.length))

    def documents(self, begin: int, end: int) -> _Documents | None:
        return None if self.given.cu_seqlens is None else _documents(self.given.cu_seqlens, begin, end)

    def channels(self, t: Tensor, begin: int, end: int) -> Tensor:
        """A (b, l, d) argument's segment as (b, length, g, e)."""
        return t[:, begin:end].to(self.A.dtype).unflatten(2, (self.A.shape[0], -1))

    def matrix(self, t: Tensor, begin: int, end: int) -> Tensor:
        """B's or C's segment (b, length, g, n)."""
        return t[:, begin:end].to(self.A.dtype)

    def step_sizes(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Δ and its derivative by delta, (b, length, g, e)."""
        delta = self.channels(self.given.delta, begin, end)
        if self.given.delta_bias is not None:
            delta = delta + self.given.delta_bias.to(delta.dtype).view(delta.shape[2:])
        if not self.given.delta_softplus:
            return delta, torch.ones_like(delta)
        return F.softplus(delta), torch.sigmoid(delta)

    def states(self, step: Tensor, begin: int, end: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The decays, the states and the states one step before, (b, length, g, n, e), from the ``state`` at ``begin``.

        A document's first step decays its own initial state.
        """
        decay = torch.exp(step.unsqueeze(3) * self.A)
        inflow = step * self.channels(self.given.u, begin, end)
        h = self.matrix(self.given.B, begin, end).unsqueeze(4) * inflow.unsqueeze(3)
        documents = self.documents(begin, end)
        carried = decay
        if documents is not None and documents.starts.numel():
            carried = decay.index_fill(1, documents.starts, 0)
            if self.initial is not None:
                h[0, documents.starts] += decay[0, documents.starts] * self.initial[documents.started]
        h[:, 0] += carried[:, 0] * state
        scan_(h, carried.clone() if carried is decay and self.chunks > 1 else carried, self.chunks)
        before = torch.cat([state.unsqueeze(1), h[:, :-1]], dim=1)
        if documents is not None and documents.starts.numel():
            before[0, documents.starts] = 0 if self.initial is None else self.initial[documents.started]
        return decay, h, before


def scan_(x: Tensor, decay: Tensor, chunks: int, *, backwards: bool = False) -> None:
    """x_t += decay_t x_{t-1} along axis 1, in place; backwards: x_t += decay_t x_{t+1}.

    The chunks are scanned side by side, then corrected one after the other by what enters them; ``decay`` is
    overwritten with its running product unless there is only one chunk. A length that is no multiple of ``chunks``
    is scanned as one chunk.
    """
    if x.shape[1] % chunks:
        chunks = 1

    def views(t: Tensor, axis: int) -> tuple[Tensor, ...]:
        found = t.unflatten(1, (chunks, -1)).unbind(axis)
        return found[::-1] if backwards else found

    xs, decays = views(x, 2), views(decay, 2)
    for before, now, factor in zip(xs, xs[1:], decays[1:], strict=False):
        now.addcmul_(factor, before)
    if chunks == 1:
        return
    for before, now in itertools.pairwise(decays):
        now.mul_(before)
    xs, decays = views(x, 1), views(decay, 1)
    last = 0 if backwards else -1
    for before, now, factor in zip(xs, xs[1:], decays[1:], strict=False):
        now.addcmul_(factor, before[:, last].unsqueeze(1))


def _prepare(given: Arguments) -> _Scan:
    acc = accumulation_dtype(given.u.dtype)

    def grouped(t: Tensor) -> Tensor:  # (..., d, n) -> (..., g, n, e)
        return t.to(acc).unflatten(-2, (given.B.shape[2], -1)).transpose(-1, -2).contiguous()

    length, chunks = _segment_length(given.u.shape[0], given.A.shape[0], given.A.shape[1], given.u.device.type)
    initial = None if given.initial_state is None else grouped(given.initial_state)
    return _Scan(given, grouped(given.A), initial, length, chunks)


def _ungrouped(t: Tensor) -> Tensor:
    """(..., g, n, e) -> (..., d, n)"""
    return t.transpose(-1, -2).flatten(-3, -2).contiguous()


def _first_state(scan: _Scan) -> Tensor:
    """The state that enters the first segment, a copy: with packing every document brings its own."""
    if scan.initial is not None and scan.given.cu_seqlens is None:
        return scan.initial.clone()
    return scan.A.new_zeros(scan.given.u.shape[0], *scan.A.shape)


def forward(*arguments, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """y, the final state and, if ``save``, the state at the start of each segment; arguments as in the interface."""
    scan = _prepare(Arguments(*arguments))
    y = torch.empty_like(scan.given.u, memory_format=torch.contiguous_format)
    state, kept = _first_state(scan), []
    finals = None
    if scan.given.cu_seqlens is not None:
        rows = scan.given.cu_seqlens.shape[0] - 1
        finals = scan.A.new_zeros(rows, *scan.A.shape) if scan.initial is None else scan.initial.clone()
    for begin, end in scan.segments():
        if save:
            kept.append(state)
        step, _ = scan.step_sizes(begin, end)
        _, h, _ = scan.states(step, begin, end, state)
        state = h[:, -1].clone()
        documents = scan.documents(begin, end)
        if finals is not None and documents is not None:
            finals[documents.ended] = h[0, documents.ends]
        y[:, begin:end] = _gated(scan, _readout(scan, h, begin, end), begin, end)
    checkpoints = torch.stack(kept) if kept else scan.A.new_empty((0, *state.shape) if save else (0,))
    return y, _ungrouped(state if finals is None else finals), checkpoints


def _readout(scan: _Scan, h: Tensor, begin: int, end: int) -> Tensor:
    """C h + D u, (b, length, d)."""
    y = (scan.matrix(scan.given.C, begin, end).unsqueeze(3) @ h).flatten(2)
    return y if scan.given.D is None else y + scan.given.D.to(y.dtype) * scan.given.u[:, begin:end].to(y.dtype)


def _gated(scan: _Scan, y: Tensor, begin: int, end: int) -> Tensor:
    return y if scan.given.z is None else y * F.silu(scan.given.z[:, begin:end].to(y.dtype))


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, segment by segment from the end."""
    *inputs, checkpoints = arguments
    scan = _prepare(Arguments(*inputs))
    gradients = _Gradients(scan, dfinal_state)
    for index, (begin, end) in reversed(list(enumerate(scan.segments()))):
        gradients.segment(dy[:, begin:end].to(scan.A.dtype), begin, end, checkpoints[index])
    return gradients.result()


class _Gradients:
    """The gradients so far, and the gradient of the state that goes back from segment to segment."""

    def __init__(self, scan: _Scan, dfinal_state: Tensor | None) -> None:
        self.scan = scan
        g, _, e = scan.A.shape
        dfinal = None
        if dfinal_state is not None:
            dfinal = dfinal_state.to(scan.A.dtype).unflatten(-2, (g, e)).transpose(-1, -2)
        packed = scan.given.cu_seqlens is not None
        self.carry = torch.zeros_like(_first_state(scan)) if packed or dfinal is None else dfinal.clone()
        self.dfinal = dfinal if packed else None
        # An empty document hands its initial state on; the others overwrite their row.
        self.dinitial = None
        if packed and scan.initial is not None:
            self.dinitial = torch.zeros_like(scan.initial) if dfinal is None else dfinal.clone()
        self.du, self.ddelta = (scan.A.new_empty(t.shape) for t in (scan.given.u, scan.given.delta))
        self.dB, self.dC = (scan.A.new_empty(t.shape) for t in (scan.given.B, scan.given.C))
        self.dz = None if scan.given.z is None else scan.A.new_empty(scan.given.z.shape)
        self.dA = torch.zeros_like(scan.A)
        self.dD = None if scan.given.D is None else torch.zeros_like(scan.given.D, dtype=scan.A.dtype)

    def segment(self, dy: Tensor, begin: int, end: int, state: Tensor) -> None:
        scan, here = self.scan, slice(begin, end)
        u = scan.channels(scan.given.u, begin, end)
        step, slope = scan.step_sizes(begin, end)
        decay, h, before = scan.states(step, begin, end, state)
        if scan.given.z is not None and self.dz is not None:
            z = scan.given.z[:, here].to(dy.dtype)
            gate = torch.sigmoid(z)
            self.dz[:, here] = dy * _readout(scan, h, begin, end) * gate * (1 + z * (1 - gate))
            dy = dy * z * gate
        dy_grouped = dy.unflatten(2, u.shape[2:])
        dh = self._state_gradient(dy_grouped, decay, begin, end)
        self.dC[:, here] = (h @ dy_grouped.unsqueeze(4)).squeeze(4)
        self.dB[:, here] = (dh @ (step * u).unsqueeze(4)).squeeze(4)
        dinflow = (scan.matrix(scan.given.B, begin, end).unsqueeze(3) @ dh).squeeze(3)
        dexponent = dh.mul_(decay).mul_(before)  # the gradient of Δ A
        self.dA += (dexponent * step.unsqueeze(3)).sum((0, 1))
        self.ddelta[:, here] = ((dinflow * u + (dexponent * scan.A).sum(3)) * slope).flatten(2)
        du = (dinflow * step).flatten(2)
        if scan.given.D is not None and self.dD is not None:
            du += dy * scan.given.D.to(dy.dtype)
            self.dD += (dy * u.flatten(2)).sum((0, 1))
        self.du[:, here] = du

    def _state_gradient(self, dy: Tensor, decay: Tensor, begin: int, end: int) -> Tensor:
        """The gradient of every state of the segment, (b, length, g, n, e)."""
        scan, documents = self.scan, self.scan.documents(begin, end)
        dh = scan.matrix(scan.given.C, begin, end).unsqueeze(4) * dy.unsqueeze(3)
        dh[:, -1] += self.carry
        if documents is not None and self.dfinal is not None:
            dh[0, documents.ends] += self.dfinal[documents.ended]
        carried = decay
        if documents is not None and documents.starts.numel():
            carried = decay.index_fill(1, documents.starts, 0)
        scan_(dh, carried.roll(-1, dims=1), scan.chunks, backwards=True)
        self.carry = carried[:, 0] * dh[:, 0]
        if documents is not None and self.dinitial is not None:
            self.dinitial[documents.started] = (decay * dh)[0, documents.starts]
        return dh

    def result(self) -> tuple[Tensor | None, ...]:
        scan = self.scan
        dinitial = None
        if scan.initial is not None:
            dinitial = _ungrouped(self.carry if self.dinitial is None else self.dinitial)
        dbias = None if scan.given.delta_bias is None else self.ddelta.sum((0, 1))
        dA = _ungrouped(self.dA)
        return self.du, self.ddelta, dA, self.dB, self.dC, self.dD, self.dz, dbias, dinitial
