"""The loss of one token from its logits, and the gradients of those, in plain Triton: a row of logits is read twice,
the second time backwards, for what was read last is what a cache still holds."""

import triton
import triton.language as tl

from mambalm.ops.triton_support import LOG2E


@triton.jit
def load_logits(logits, bias, column, width, EVICT: tl.constexpr):
    """Some logits of a row, -inf behind its end."""
    there = column < width
    a = tl.load(logits + column, mask=there, other=float("-inf"), eviction_policy=EVICT)
    if bias is not None:
        a += tl.load(bias + column, mask=there, other=0.0)
    return a


@triton.jit
def softmax_losses(logits, bias, labels, factors, losses, dlogits, width, z_loss, BLOCK: tl.constexpr):
    """With Z = Σ exp(a): log Z - a[label] + z_loss (log Z)², and if there are ``dlogits`` what ``factors`` times that
    gives for the logits. A label outside of the row gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    label = tl.load(labels + row)
    column = tl.arange(0, BLOCK)
    # Each lane keeps the largest of its logits and the sum of exp(a - largest); lanes are joined at the end.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        a = load_logits(logits, bias, start + column, width, "evict_last")
        larger = tl.maximum(largest, a)
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2((largest - origin) * LOG2E) + tl.exp2((a - origin) * LOG2E)
        largest = larger
    top = tl.max(largest, axis=0)
    log_normaliser = top + tl.log(tl.sum(total * tl.exp2((largest - top) * LOG2E), axis=0))
    inside = (label >= 0) & (label < width)
    at_label = tl.load(logits + label, mask=inside, other=float("nan"))
    if bias is not None:
        at_label += tl.load(bias + label, mask=inside, other=0.0)
    tl.store(losses + row, log_normaliser - at_label + z_loss * log_normaliser * log_normaliser)
    if dlogits is not None:
        dlogits += row * width
        factor = tl.load(factors + row)
        slope = factor * (1.0 + 2.0 * z_loss * log_normaliser)
        last = (width - 1) // BLOCK * BLOCK
        for back in range(0, width, BLOCK):
            at = last - back + column
            a = load_logits(logits, bias, at, width, "evict_first")
            out = slope * tl.exp2((a - log_normaliser) * LOG2E)
            out -= tl.where(at == label, factor, 0.0)
            out = out.to(dlogits.dtype.element_ty)
            tl.store(dlogits + at, out, mask=at < width, eviction_policy="evict_first")
