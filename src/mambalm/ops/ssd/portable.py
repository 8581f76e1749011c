"""ssd in plain torch, on any device: the block decomposition of the Mamba-2 paper, a segment of chunks at a time.

Within a chunk the scan is the masked attention (L ∘ C Bᵀ) X, between chunks a recurrence of states. Everything is a
batched matrix product over the chunks of a segment; memory beyond inputs and outputs is that of one segment, and in
the backward of as many states as the square root of the number of segments, twice. Axes of a segment: r documents,
k chunks, q tokens, e = (h / g) p channels of a group.

No exponent is positive (for A < 0), and no sum of step sizes is the difference of two longer ones, which would lose
small steps beside a large one to rounding.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalm.ops.backends import Call, accumulation_dtype
from mambalm.ops.ssd.layout import Block, Segment, blocks

_CHUNK = 64
# Elements of a segment's largest tensors: on a CPU they should stay in cache, elsewhere they should fill the device.
_SEGMENT_ELEMENTS = {"cpu": 1 << 19}
# The logarithm of a decay that forgets: exp of it is 0 in every dtype; finite, because 0 times -inf is not a number.
_FORGET = -1e4
# The backward keeps the states between stretches of so many segments, or of the square root of all, and those within.
_STRETCH = 16


def supports(call: Call) -> str | None:
    """It runs everywhere."""
    return None


def checkpoint_shape(call: Call) -> tuple[int, ...]:
    """Nothing is kept for the backward: it computes the states at the segments' starts again."""
    return (0,)


@dataclass(frozen=True)
class _Scan:
    """The arguments, (b, l, ...) flattened to (b l, ...): a view of any slice of a projection's output."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None  # (h, 1) or (h, p)
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    edges: list[int]  # of the rows to compute
    starts: Tensor | None  # (b l), True where a document starts within a row
    chunk: int

    def blocks(self) -> Iterator[Block]:
        _, h, p = self.x.shape
        widest = h * max(p, self.B.shape[2], self.chunk)
        elements = _SEGMENT_ELEMENTS.get(self.x.device.type, 1 << 26)
        return blocks(self.edges, self.chunk, elements // max(widest, 1), self.x.device)

    def new_states(self, handed_on: Tensor) -> Tensor:
        """Room for a state of each document; an empty document hands its own on as it is."""
        states = torch.empty_like(handed_on, memory_format=torch.contiguous_format)
        if empty := [row for row, (begin, end) in enumerate(itertools.pairwise(self.edges)) if begin == end]:
            states[empty] = handed_on[empty]
        return states


@dataclass(frozen=True)
class _Chunks:
    """A segment's inputs and decays."""

    x: Tensor  # (r, k, q, h, p)
    inflow: Tensor  # the paper's discrete X = Δ x
    step: Tensor  # Δ (r, k, q, h)
    slope: Tensor  # its derivative by dt
    log_decay: Tensor  # Δ A (r, k, h, q)
    B: Tensor  # (r, k, g, q, n)
    C: Tensor

    def scores(self) -> Tensor:
        """C Bᵀ (r, k, g, 1, q, q), to be broadcast over the heads of a group."""
        return (self.C @ self.B.mT).unsqueeze(3)

    def from_start(self) -> Tensor:
        """What is left at each token of the state that enters its chunk, (r, k, q, h)."""
        return self.log_decay.cumsum(-1).exp_().transpose(2, 3)

    def to_end(self) -> Tensor:
        """What is left at the end of a chunk of what each token adds, (r, k, q, h)."""
        return F.pad(self.log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).exp_().flip(-1).transpose(2, 3)

    def through(self) -> Tensor:
        """What is left at the end of a chunk of the state that enters it, (r, k, h)."""
        return self.log_decay.sum(-1).exp_()

    def within(self) -> Tensor:
        """The paper's L: what is left at token i of what token j adds, (r, k, g, h / g, q, q), 0 for j > i."""
        q = self.log_decay.shape[-1]
        below = self.log_decay.new_ones(q, q).tril(-1)
        sums = (below * self.log_decay[..., None]).cumsum_(-2)
        return sums.exp_().tril_().unflatten(2, (self.B.shape[2], -1))

    def into_groups(self, t: Tensor) -> Tensor:
        """(r, k, q, h, p) -> (r, k, g, q, e)"""
        return t.unflatten(3, (self.B.shape[2], -1)).flatten(-2).transpose(2, 3)

    def into_heads(self, t: Tensor) -> Tensor:
        """(r, k, g, q, e) -> (r, k, q, h, p)"""
        return t.transpose(2, 3).flatten(-2).unflatten(-1, self.x.shape[3:])

    def added(self) -> Tensor:
        """What each chunk adds to the state at its end, (r, k, h, p, n)."""
        kept = self.into_groups(self.inflow * self.to_end()[..., None])
        return self.states(kept.mT @ self.B)

    def states(self, t: Tensor) -> Tensor:
        """(r, k, g, e, n) -> (r, k, h, p, n)"""
        return t.flatten(2, 3).unflatten(2, self.x.shape[3:])

    def rows(self, states: Tensor) -> Tensor:
        """(r, k, h, p, n) -> (r, k, g, e, n)"""
        return states.flatten(2, 3).unflatten(2, (self.B.shape[2], -1))


def _prepare(  # the interface's arguments
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    *,
    states: bool,
) -> tuple[_Scan, Tensor]:
    """The arguments flattened, and the states (rows, h, p, n) that the rows start from, not to be written.

    Packed documents are a row each if ``states`` of them are to come or to go; else all of them are one row, in which
    the first token of each forgets what was before.
    """
    b, l, h, p = x.shape
    acc = accumulation_dtype(x.dtype)
    edges, starts = [i * l for i in range(b + 1)], None
    if cu_seqlens is not None and (states or initial_state is not None):
        edges = cu_seqlens.tolist()
    elif cu_seqlens is not None:
        starts = cu_seqlens.new_zeros(l + 1, dtype=torch.bool)
        starts[cu_seqlens.long()] = True
    x, dt, B, C = (t.flatten(0, 1) for t in (x, dt, B, C))
    scan = _Scan(
        x,
        dt,
        A.to(acc),
        B,
        C,
        None if D is None else D.to(acc).view(h, -1),
        None if z is None else z.flatten(0, 1),
        None if dt_bias is None else dt_bias.to(acc),
        dt_softplus,
        dt_min,
        dt_max,
        edges,
        starts,
        chunk_size or _CHUNK,
    )
    if initial_state is None:
        return scan, scan.A.new_zeros(1, h, p, B.shape[2]).expand(len(edges) - 1, -1, -1, -1)
    return scan, initial_state.to(acc)


def _load(scan: _Scan, segment: Segment) -> _Chunks:
    acc = scan.A.dtype
    dt = segment.take(scan.dt, acc)
    if scan.dt_bias is not None:
        dt = dt + scan.dt_bias
    unlimited = F.softplus(dt) if scan.dt_softplus else dt
    step = unlimited.clamp(scan.dt_min, scan.dt_max)
    slope = (step == unlimited).to(acc)
    if scan.dt_softplus:
        slope = slope * torch.sigmoid(dt)
    if segment.real is not None:
        real = segment.real.view(*segment.shape, 1)
        step, slope = step * real, slope * real
    B, C = (segment.take(t, acc).transpose(2, 3) for t in (scan.B, scan.C))
    x = segment.take(scan.x, acc)
    log_decay = step * scan.A
    if scan.starts is not None:
        log_decay.masked_fill_(segment.take(scan.starts, torch.bool)[..., None], _FORGET)
    return _Chunks(x, x * step[..., None], step, slope, log_decay.transpose(2, 3).contiguous(), B, C)


def _pass_on_(added: Tensor, decay: Tensor, state: Tensor, *, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """The recurrence between chunks, state = decay state + added: the states before each chunk, and the last.

    ``added`` (r, k, h, p, n) is overwritten with the states after each chunk. Backwards, the chunks are taken from the
    last to the first.
    """
    edge, after = state.unsqueeze(1), list(added.unbind(1))
    factors = list(decay[..., None, None].unbind(1))
    for now, factor in list(zip(after, factors, strict=True))[:: -1 if backwards else 1]:
        state = now.addcmul_(factor, state)
    if len(after) == 1:
        return edge, state
    return torch.cat([added[:, 1:], edge] if backwards else [edge, added[:, :-1]], dim=1), state


def _outputs(chunks: _Chunks, D: Tensor | None, entering: Tensor) -> Tensor:
    """C h + D x (r, k, q, h, p), from the states (r, k, h, p, n) that enter the chunks."""
    y = _carried(chunks, entering)
    attention = chunks.within().mul_(chunks.scores()).flatten(2, 3)
    y += (attention @ chunks.inflow.transpose(2, 3)).transpose(2, 3)
    return y if D is None else y.addcmul_(chunks.x, D)


def _carried(chunks: _Chunks, entering: Tensor) -> Tensor:
    """The outputs' part that comes from the states entering the chunks."""
    return chunks.into_heads(chunks.C @ chunks.rows(entering).mT).mul_(chunks.from_start()[..., None])


def forward(*arguments, final: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """y, the final state (empty unless asked for) and an empty tensor; arguments as in the interface."""
    scan, initial = _prepare(*arguments, states=final)
    states = scan.new_states(initial)
    y = torch.empty_like(arguments[0], memory_format=torch.contiguous_format)
    for block in scan.blocks():
        state = initial[block.rows]
        for segment in block.segments:
            chunks = _load(scan, segment)
            entering, state = _pass_on_(chunks.added(), chunks.through(), state)
            out = _outputs(chunks, scan.D, entering)
            if scan.z is not None:
                out *= F.silu(segment.take(scan.z, out.dtype))
            segment.put(y, out)
        states[block.rows] = state
    nothing = states.new_empty(0)
    return y, states if final else nothing, nothing.clone()


def _states_before(scan: _Scan, segments: list[Segment], state: Tensor) -> Iterator[Tensor]:
    """The state that enters each of consecutive segments, computed when it is asked for."""
    yield state
    for segment in segments[:-1]:
        chunks = _load(scan, segment)
        state = _pass_on_(chunks.added(), chunks.through(), state)[1].clone()  # not a view that keeps the rest alive
        yield state


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of x, dt, A, B, C, D, z, dt_bias and initial_state, segment by segment from the end."""
    *inputs, _ = arguments
    scan, initial = _prepare(*inputs, states=dfinal_state is not None)
    dfinal = initial.new_zeros(1).expand_as(initial) if dfinal_state is None else dfinal_state.to(initial.dtype)
    dinitial = scan.new_states(dfinal)
    found = _Gradients(scan, dy, *inputs[:8])
    for block in scan.blocks():
        dstate, count = dfinal[block.rows], len(block.segments)
        every = max(_STRETCH, math.isqrt(count))
        before = _states_before(scan, block.segments, initial[block.rows])
        kept = list(itertools.islice(before, 0, (count - 1) // every * every + 1, every))
        for index, start in reversed(list(enumerate(kept))):
            stretch = block.segments[index * every : (index + 1) * every]
            for segment, state in reversed(list(zip(stretch, _states_before(scan, stretch, start), strict=True))):
                dstate = found.segment(segment, state, dstate)
        dinitial[block.rows] = dstate
    return found.dx, found.ddt, found.dA, found.dB, found.dC, found.dD, found.dz, found.dbias, dinitial


class _Gradients:
    """The gradients so far: those of tokens are written once, those of parameters summed."""

    def __init__(
        self,
        scan: _Scan,
        dy: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
    ) -> None:
        def like(t: Tensor) -> Tensor:
            return torch.empty_like(t, memory_format=torch.contiguous_format)

        self.scan, self.dy = scan, dy.flatten(0, 1)
        self.dx, self.ddt, self.dB, self.dC = like(x), like(dt), like(B), like(C)
        self.dz = None if z is None else like(z)
        self.dA, self.dbias = torch.zeros_like(scan.A), torch.zeros_like(scan.A)
        self.dD = None if D is None else torch.zeros_like(D, dtype=scan.A.dtype)

    def segment(self, segment: Segment, state: Tensor, dstate: Tensor) -> Tensor:
        """Account for a segment that ``state`` enters; from the gradient of the state after it to that of ``state``."""
        chunks = _load(self.scan, segment)
        through = chunks.through()
        entering, _ = _pass_on_(chunks.added(), through, state)
        dy = self._ungated(segment, chunks, entering)
        arriving = chunks.states(chunks.into_groups(dy * chunks.from_start()[..., None]).mT @ chunks.C)
        leaving, dstate = _pass_on_(arriving, through, dstate, backwards=True)
        dinflow, dB, dC, dlog_decay = _chunk_gradients(chunks, dy, entering, leaving)
        dx = dinflow * chunks.step[..., None]
        if self.scan.D is not None and self.dD is not None:
            dx.addcmul_(dy, self.scan.D)
            self.dD += (dy * chunks.x).sum((0, 1, 2)).sum_to_size(self.scan.D.shape).view_as(self.dD)
        ddt = ((dinflow * chunks.x).sum(-1) + dlog_decay * self.scan.A) * chunks.slope
        self.dA += (dlog_decay * chunks.step).sum((0, 1, 2))
        self.dbias += ddt.sum((0, 1, 2))
        for out, values in ((self.dx, dx), (self.ddt, ddt), (self.dB, dB), (self.dC, dC)):
            segment.put(out, values)
        return dstate

    def _ungated(self, segment: Segment, chunks: _Chunks, entering: Tensor) -> Tensor:
        """The gradient of the output before the gate; the gate's own is written."""
        dy = segment.take(self.dy, chunks.x.dtype)
        if self.scan.z is None or self.dz is None:
            return dy
        z = segment.take(self.scan.z, dy.dtype)
        gate = torch.sigmoid(z)
        y = _outputs(chunks, self.scan.D, entering)
        segment.put(self.dz, dy * y * gate * (1 + z * (1 - gate)))
        return dy * z * gate


def _chunk_gradients(
    chunks: _Chunks, dy: Tensor, entering: Tensor, leaving: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of Δ x (r, k, q, h, p), B and C (r, k, q, g, n) and Δ A (r, k, q, h).

    ``entering`` are the states before the chunks, ``leaving`` the gradients of the states after them.
    """
    from_start, to_end, inflow = chunks.from_start()[..., None], chunks.to_end()[..., None], chunks.inflow
    # Between chunks: the outputs read the state that enters, the inflow adds to the state that leaves.
    dC = chunks.into_groups(dy * from_start) @ chunks.rows(entering)
    dB = chunks.into_groups(inflow * to_end) @ chunks.rows(leaving)
    dinflow = chunks.into_heads(chunks.B @ chunks.rows(leaving).mT).mul_(to_end)
    reads = (dy * _carried(chunks, entering)).sum(-1)  # (r, k, q, h)
    writes = (inflow * dinflow).sum(-1)
    # Within chunks: masked attention, the scores C Bᵀ times the decays.
    attention = chunks.within()
    dattention = (dy.transpose(2, 3) @ inflow.permute(0, 1, 3, 4, 2)).view_as(attention)
    dscores = (dattention * attention).sum(3)
    attention.mul_(chunks.scores())
    dC += dscores @ chunks.B
    dB += dscores.mT @ chunks.C
    dinflow += (attention.flatten(2, 3).mT @ dy.transpose(2, 3)).transpose(2, 3)
    pairs = dattention.mul_(attention).flatten(2, 3)  # (r, k, h, q, q): what j gives to i, weighed by i's gradient
    passed = (entering * leaving).sum((-1, -2)) * chunks.through()
    dlog_decay = _crossing(pairs) + _crossing_ends(reads, writes) + passed[:, :, None]
    return dinflow, dB.transpose(2, 3), dC.transpose(2, 3), dlog_decay


def _crossing(pairs: Tensor) -> Tensor:
    """The gradient of each decay from the pairs it lies between: of t, the sum over j < t <= i; (r, k, q, h)."""
    before = pairs.cumsum(-1)  # [i, t]: sum over j <= t
    return F.pad(before.tril_(-1).sum(-2)[..., :-1], (1, 0)).transpose(2, 3)


def _crossing_ends(reads: Tensor, writes: Tensor) -> Tensor:
    """The same for the pairs with one end outside the chunk: reads at i >= t, writes at j < t."""
    return reads.flip(2).cumsum(2).flip(2) + F.pad(writes.cumsum(2)[:, :, :-1], (0, 0, 1, 0))
