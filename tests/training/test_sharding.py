"""A model under FSDP2 on one rank: the dtypes that reach the ops, initial values, what is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mambalm.data.tokenizer import load_tokenizer
from mambalm.layers import mamba, mamba2
from mambalm.training.distributed import Ranks
from mambalm.training.model import build_model
from mambalm.training.parallelism import _compile, _recompute, _shard, parallelise
from mambalm.training.parts import put_whole
from mambalm.training.precision import policy
from mambalm.training.recipe import ParallelSection
from tests.helpers import FLOAT32, relative_error
from tests.training.runs import recipe, write_data
from tests.training.spread import VOCABULARY, network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def loss_of(model: Any, precision: str) -> torch.Tensor:
    ids = torch.arange(34).reshape(2, 17) % VOCABULARY
    with policy(precision, CPU).autocast():
        return model(ids, labels=ids, use_cache=False, skip_logits=True).loss


@pytest.mark.parametrize("precision", ["bf16", "fp16", "v100", "fp32"])
@pytest.mark.parametrize("sharded", [False, True], ids=["autocast", "FSDP2"])
def test_dtypes_inside_the_forward(
    sharded: bool, precision: str, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A, D and the bias of Δ in float32, and the masters of all; activations and large matrices in that of products."""
    compute = policy(precision, CPU).compute_dtype
    model = network()
    seen: list[dict[str, torch.dtype]] = []
    scan = mamba.selective_scan

    def watched(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any, **options: Any) -> Any:
        seen.append({"u": u.dtype, "A": A.dtype, "D": D.dtype, "bias": bias.dtype})
        return scan(u, delta, A, B, C, D, z, bias, **options)

    monkeypatch.setattr(mamba, "selective_scan", watched)
    if sharded:
        _shard(model, mesh, policy(precision, CPU))
    held: dict[str, torch.dtype] = {}
    mixer = model.backbone.layers[1].mixer
    mixer.in_proj.register_forward_pre_hook(lambda module, _: held.update(in_proj=module.weight.dtype))
    mixer.register_forward_pre_hook(lambda module, _: held.update(A_log=module.A_log.dtype, D=module.D.dtype))
    mixer.dt_proj.register_forward_pre_hook(lambda module, _: held.update(bias=module.bias.dtype))
    loss_of(model, precision).backward()
    full = torch.float32
    assert seen == [{"u": compute, "A": full, "D": full, "bias": full}] * 2
    assert held == {"in_proj": compute if sharded else full, "A_log": full, "D": full, "bias": full}
    assert all(parameter.dtype == full for parameter in model.parameters())
    assert all(parameter.grad.dtype == full for parameter in model.parameters())


@pytest.mark.parametrize("family", ["mamba2", "transformer"])
def test_the_large_matrices_of_every_family(family: str, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(family)
    seen: list[torch.dtype] = []
    ssd = mamba2.ssd
    monkeypatch.setattr(mamba2, "ssd", lambda *a, **named: (seen.extend((a[2].dtype, a[5].dtype)), ssd(*a, **named))[1])
    _shard(model, mesh, policy("bf16", CPU))
    held: list[torch.dtype] = []
    for name, module in model.named_modules():
        if name.endswith(("in_proj", "out_proj", "fc1", "fc2")):
            module.register_forward_pre_hook(lambda module, _: held.append(module.weight.dtype))
    loss_of(model, "bf16").backward()
    assert set(held) == {torch.bfloat16}
    assert len(held) == (4 if family == "mamba2" else 8)
    assert set(seen) <= {torch.float32}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "transformer", "hybrid"])
def test_initial_values_are_those_of_a_whole_model(family: str, mesh: DeviceMesh) -> None:
    whole = network(family)
    after = torch.get_rng_state()
    with torch.device("meta"):
        model = network(family)
    model = _shard(model, mesh, policy("fp32", CPU), seed=0)
    assert torch.equal(torch.get_rng_state(), after)
    assert model.state_dict().keys() == whole.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), whole.state_dict()[name]), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "transformer", "hybrid"])
def test_a_whole_model_is_drawn_where_it_is_to_run(family: str, device: str) -> None:
    whole = network(family)
    after = torch.get_rng_state()
    with torch.device("meta"):
        model = network(family)
    put_whole(model, 0, torch.device(device))
    assert torch.equal(torch.get_rng_state(), after)
    expected, found = whole.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert {value.device.type for value in found.values()} == {device}
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in found.items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in whole.parameters()]


@pytest.mark.gpu
@pytest.mark.parametrize("start", [False, True])
def test_a_recipe_s_model_is_made_on_the_gpu(tmp_path: Path, start: bool) -> None:
    write_data(tmp_path)
    network().save_pretrained(tmp_path / "model")
    made = recipe(tmp_path, {"model": {"start": str(tmp_path / "model")}} if start else {})
    model = build_model(made, precision=policy("fp32", torch.device("cuda")))
    expected = build_model(made).state_dict()
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_in_half_precision_for_another_tokenizer(mesh: DeviceMesh, tmp_path: Path) -> None:
    """Read part by part it begins as read whole: float32 of the file's values, new embeddings drawn."""
    write_data(tmp_path)
    network().bfloat16().save_pretrained(tmp_path / "model")
    made = recipe(tmp_path, {"model": {"start": str(tmp_path / "model"), "new_embeddings": True}})
    tokenizer = load_tokenizer(made.tokenizer)
    whole = build_model(made, tokenizer)
    model = _shard(build_model(made, tokenizer, sharded=True), mesh, policy("bf16", CPU))
    assert whole.backbone.embeddings.weight.shape == (272, 16)
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value.full_tensor(), whole.state_dict()[name]), name


@pytest.mark.parametrize("family", ["mamba", "mamba2", "transformer"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_what_is_computed_again_changes_no_gradient(family: str, checkpointing: str) -> None:
    gradients = []
    for name in ("none", checkpointing):
        model = network(family)
        parallelise(model, ParallelSection(checkpointing=name), policy("fp32", CPU), Ranks())
        loss_of(model, "fp32").backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    # Blocks that are computed again add to the residual stream before they return.
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_what_is_computed_again_is_not_kept(checkpointing: str) -> None:
    sizes = []
    for name in ("none", checkpointing):
        model = network("transformer")
        parallelise(model, ParallelSection(checkpointing=name), policy("fp32", CPU), Ranks())
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.nbytes), t)[1], lambda t: t):
            loss_of(model, "fp32")
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0]


def test_mixers_compute_again_themselves() -> None:
    def found(family: str, checkpointing: str, compiled: bool = False) -> set[tuple[Any, bool]]:
        model = network(family)
        _recompute(model, checkpointing, compiled)
        return {(block.mixer.recompute, block.gradient_checkpointing) for block in model.backbone.layers}

    for family in ("mamba", "mamba2"):
        assert found(family, "none") == {(False, False)}
        assert found(family, "selective") == {(True, False)}
    assert found("mamba", "full") == {("layer", False)}
    assert found("mamba", "full", compiled=True) == found("mamba2", "full") == {(False, True)}
    assert found("mamba2", "selective", compiled=True) == {(None, True)}


@pytest.mark.parametrize(("family", "checkpointing"), [("mamba", "selective"), ("transformer", "full")])
def test_what_is_sharded_and_computed_again_is_compiled(family: str, checkpointing: str, mesh: DeviceMesh) -> None:
    expected = network(family)
    loss_of(expected, "fp32").backward()
    with torch.device("meta"):
        model = network(family)
    _recompute(model, checkpointing)
    _compile(model, ParallelSection(mode="fsdp", checkpointing=checkpointing))
    _shard(model, mesh, policy("fp32", CPU))
    torch._dynamo.reset()
    counters.clear()
    loss_of(model, "fp32").backward()
    # The projections before and behind FSDP2's hooks, the convolution and the scan.
    assert counters["stats"]["calls_captured"] > 20
    found = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        assert relative_error(found[name].grad.full_tensor(), parameter.grad) <= FLOAT32, name


def test_what_checkpointing_keeps_is_not_compiled_in_shards() -> None:
    with pytest.raises(ValueError, match="not possible in sharded blocks of Attention: use full or none"):
        _compile(network("transformer"), ParallelSection(mode="fsdp", checkpointing="selective"))
