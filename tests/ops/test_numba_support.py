"""The mathematics of the numba kernels: stated errors, NaN, bfloat16 rounding, threads after a fork."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numba import njit

from mambalm.ops import numba_support as support
from mambalm.ops import selective_scan


@njit
def _map(function, x, out):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        out[i] = function(x[i])


@njit
def _round_trip(x, halves, back):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        halves[i] = support.narrow(halves, x[i])
        back[i] = support.widen(halves[i])


def evaluate(name: str, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    _map(getattr(support, name), x, out)
    return out


EXACT = {
    "exp2": (np.exp2, -126.0, 127.0),
    "softplus": (lambda x: np.logaddexp(0, x), -80.0, 80.0),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -80.0, 80.0),
}
ERRORS = {"exp2": (1.72e-7, 0), "softplus": (2.5e-7, 1e-7), "sigmoid": (2.5e-7, 1e-7)}


def assert_within_the_stated_error(name: str, x: np.ndarray) -> None:
    found = np.abs(evaluate(name, x) / EXACT[name][0](x.astype(np.float64)) - 1)
    stated, growth = ERRORS[name]
    assert (found <= stated + growth * np.maximum(-x, 0)).all(), (found.max(), x[found.argmax()])


@pytest.mark.parametrize("name", EXACT)
def test_stated_relative_errors(name: str) -> None:
    _, low, high = EXACT[name]
    generator = np.random.default_rng()
    x = np.concatenate([np.linspace(low, high, 200_001), generator.uniform(-8, 8, 400_000)])
    assert_within_the_stated_error(name, x.astype(np.float32))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [-3, -2, -1, 0, 1])
def test_exp2_at_every_argument(exponent: int, sign: int) -> None:
    """Every float32 from 1/8 to 4: smaller ones err less, and larger ones have no other fractions."""
    bits = np.arange(2**23, dtype=np.uint32) + np.uint32((127 + exponent) << 23)
    assert_within_the_stated_error("exp2", bits.view(np.float32) * np.float32(sign))


@pytest.mark.parametrize("name", EXACT)
def test_nan_stays_nan(name: str) -> None:
    assert np.isnan(evaluate(name, np.array([np.nan], np.float32))).all()


def test_extremes_do_not_wrap() -> None:
    x = np.array([-1e30, -200, 200, 1e30], np.float32)
    assert (evaluate("exp2", x)[:2] <= 2.0**-126).all()
    assert (evaluate("exp2", x)[2:] >= 2.0**127).all()
    np.testing.assert_allclose(evaluate("softplus", x), [0, 0, 200, 1e30], atol=1e-37, rtol=1e-6)


def test_bfloat16_rounds_as_torch() -> None:
    x = torch.cat(
        [torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), torch.tensor([0.0, torch.inf, -torch.inf])]
    )
    halves, back = np.empty(x.numel(), np.uint16), np.empty(x.numel(), np.float32)
    _round_trip(x.numpy(), halves, back)
    assert torch.equal(torch.from_numpy(back), x.bfloat16().float())
    _round_trip(np.array([np.nan], np.float32), halves, back)
    assert np.isnan(back[0])


def test_rows_of_a_strided_view_are_not_copied() -> None:
    wide = torch.randn(2, 3, 10)
    flat, distance = support.rows(wide[..., 4:9])
    assert distance == 10
    assert flat.ctypes.data == wide[..., 4:9].data_ptr()
    assert flat[1 * distance + 2] == wide[0, 1, 6]
    copied, distance = support.rows(wide.transpose(1, 2))
    assert distance == 3
    assert copied[distance + 2] == wide[0, 2, 1]


def _fill(first: int, last: int, out: np.ndarray) -> None:
    out[first:last] += 1


def _child(queue: multiprocessing.Queue[int]) -> None:
    torch.set_num_threads(2)
    out = np.zeros(64)
    support.parallel(_fill, 64, 1 << 30, (out,))
    queue.put(int(out.sum()))


@pytest.mark.usefixtures("two_threads")
def test_every_job_runs_once_here_and_in_a_child() -> None:
    out = np.zeros(64)
    support.parallel(_fill, 64, 1 << 30, (out,))
    assert (out == 1).all()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == 64
    child.join()


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_reaches_the_caller() -> None:
    def fail(first: int, last: int) -> None:
        raise RuntimeError(f"job {first}")

    with pytest.raises(RuntimeError, match="job"):
        support.parallel(fail, 8, 1 << 30, ())


def _scan(seed: int) -> list[torch.Tensor]:
    """A scan's output and gradients, of a size that is shared between threads."""
    generator = torch.Generator().manual_seed(seed)  # torch's own is shared by all threads
    u, delta = (torch.randn(1, 40, 300, generator=generator).requires_grad_() for _ in range(2))
    B, C = (torch.randn(1, 40, 16, generator=generator).requires_grad_() for _ in range(2))
    y = selective_scan(u, delta, -torch.rand(300, 16, generator=generator), B, C, delta_softplus=True, backend="cpu")
    return [y.detach(), *torch.autograd.grad(y.sum(), (u, delta, B, C))]


@pytest.mark.usefixtures("two_threads")
def test_callers_at_once_get_what_each_gets_alone() -> None:
    alone = [_scan(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(_scan, range(4)))
    for one, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.usefixtures("two_threads")
def test_a_child_forked_after_a_parallel_region_makes_threads_of_its_own() -> None:
    support.parallel(_fill, 64, 1 << 30, (np.zeros(64),))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=60) == 64
    child.join()


@pytest.mark.skipif(sys.platform != "linux", reason="torch's wheels for Linux bring libgomp")
def test_kernels_run_on_torch_s_own_threads() -> None:
    assert support._openmp() is not None


@pytest.mark.usefixtures("two_threads")
def test_without_openmp_a_pool_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _scan(0)
    monkeypatch.setattr(support, "_openmp", lambda: None)
    assert all(map(torch.equal, _scan(0), expected))
    with pytest.raises(ZeroDivisionError):
        support.parallel(lambda *_: 1 // 0, 8, 1 << 30, ())


NOWHERE = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
import torch
from mambalm import ops
y = ops.rms_norm(torch.full((2, 3), 2.0), eps=0.0, backend="cpu")
assert torch.equal(y, torch.ones(2, 3)), y
"""


def test_kernels_run_where_they_cannot_be_kept() -> None:
    """As in a container whose files are all read-only."""
    done = subprocess.run([sys.executable, "-c", NOWHERE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "set NUMBA_CACHE_DIR to a folder" in done.stderr
