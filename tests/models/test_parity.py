"""Parity with stock transformers: logits, every gradient, generated tokens, files, caches."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from mambalm.models.common import MambalmForCausalLM
from mambalm.quantization.linear import QuantizedLinear
from tests.helpers import FLOAT32, assert_close, relative_error
from tests.models.tiny import STOCK, Family, tokens

pytestmark = pytest.mark.usefixtures("portable")

# transformers 5.17 normalises Mamba-2's groups together, which it corrected later (transformers#40861).
GROUPED = "group_size" in inspect.signature(MambaRMSNormGated).parameters
FAMILIES = [
    pytest.param(family, id=name, marks=[] if GROUPED or name != "mamba2" else pytest.mark.xfail(strict=True))
    for name, family in STOCK.items()
]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mamba", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}),
    ("mamba", {"residual_in_fp32": False, "tie_word_embeddings": False, "time_step_rank": 3}),
    ("falcon_mamba", {"mixer_rms_eps": 0.1, "use_bias": True}),
    ("mamba2", {"n_groups": 1, "use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
    ("mamba2", {"n_groups": 1, "time_step_limit": (0.01, 0.05), "tie_word_embeddings": True, "chunk_size": 256}),
]


def results(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Loss, logits and the gradient of every parameter."""
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": output.loss, "logits": output.logits} | gradients


def compare(family: Family, **changes: Any) -> None:
    model = family.model(**changes).train()
    ids = tokens(2, 29)
    assert_close(results(model, ids), results(family.stock_model(model).train(), ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient(family: Family) -> None:
    compare(family)


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_options_of_the_config(name: str, changes: dict[str, Any]) -> None:
    compare(STOCK[name], **changes)


def heads() -> dict[str, MambalmForCausalLM]:
    """A head whose weight goes into the op that holds no logits, and heads that are called."""
    models = {name: STOCK["falcon_mamba"].model() for name in ("plain", "quantised", "hooked")}
    models["quantised"].lm_head = QuantizedLinear.of(models["quantised"].lm_head, 8)
    models["hooked"].lm_head.register_forward_hook(lambda module, inputs, logits: 3 * torch.tanh(logits / 3))
    return models


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("head", heads())
def test_the_loss_is_that_of_the_logits(head: str, z_loss: float) -> None:
    model, ids = heads()[head], tokens(2, 9)
    output = model(ids, labels=ids, z_loss=z_loss)
    logits = output.logits[:, :-1].flatten(0, 1).double()
    expected = F.cross_entropy(logits, ids[:, 1:].flatten()) + z_loss * logits.logsumexp(-1).square().mean()
    assert relative_error(output.loss, expected) <= FLOAT32
    nothing = torch.full_like(ids, -100)
    loss = model(ids, labels=nothing, z_loss=z_loss).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_default_backend_agrees_too() -> None:
    from mambalm import ops

    with ops.use_backend(None):
        compare(STOCK["falcon_mamba"])


def test_the_loss_alone_is_the_same_loss() -> None:
    model, ids = STOCK["mamba"].model(), tokens(2, 9)
    alone = model(ids, labels=ids, skip_logits=True)
    assert alone.logits is None
    assert torch.equal(alone.loss, model(ids, labels=ids).loss)
    with pytest.raises(ValueError, match="without labels"):
        model(ids, skip_logits=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_output(family: Family) -> None:
    model, ids = family.model(), tokens(2, 9)
    stock = family.stock_model(model)
    ours, theirs = (m(ids, output_hidden_states=True) for m in (model, stock))
    assert list(ours.keys()) == ["cache" if key == "cache_params" else key for key in theirs]
    assert_close(dict(enumerate(ours.hidden_states)), dict(enumerate(theirs.hidden_states)))
    tuples = [m(ids, labels=ids, return_dict=False) for m in (model, stock)]
    assert [type(part) for part in tuples[0]] == [type(part) for part in tuples[1]]
    last = model(ids, logits_to_keep=1).logits
    assert relative_error(last, theirs.logits[:, -1:]) <= FLOAT32
    assert relative_error(model(ids, logits_to_keep=torch.tensor([3, 5])).logits, theirs.logits[:, [3, 5]]) <= FLOAT32
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert relative_error(embedded, theirs.logits) <= FLOAT32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_the_same_tokens(family: Family, beams: int) -> None:
    model, ids = family.model(), tokens(2, 7)
    arguments = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(ids)}
    expected = family.stock_model(model).generate(ids, **arguments)
    assert expected.shape == (2, 16)
    assert torch.equal(model.generate(ids, **arguments), expected)


@pytest.mark.parametrize("family", STOCK.values(), ids=STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_in_both_directions(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    model = family.model().to(dtype)
    assert family.stock is not None
    model.save_pretrained(tmp_path / "ours")
    stock = family.stock.from_pretrained(tmp_path / "ours", dtype="auto")
    stock.save_pretrained(tmp_path / "stock")
    back = family.ours.from_pretrained(tmp_path / "stock", dtype="auto")
    for loaded in (stock, back):
        assert loaded.config.architectures == [family.stock.__name__]
        values = loaded.state_dict()
        assert values.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert values[name].dtype == dtype
            assert torch.equal(values[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill", [1, 2, 3, 11])
@torch.no_grad()
def test_caches_are_interchangeable(family: Family, prefill: int) -> None:
    """Prefill here and decode there, and the reverse; stock Mamba-1 continues right only token by token."""
    model, ids = family.model(), tokens(2, 17)
    stock = family.stock_model(model)
    expected = stock(ids).logits[:, prefill:]
    for first, second in ((model, stock), (stock, model)):
        cache = first(ids[:, :prefill], use_cache=True).cache_params
        assert isinstance(cache, DynamicCache)
        steps = [second(ids[:, t : t + 1], cache_params=cache, use_cache=True).logits for t in range(prefill, 17)]
        assert relative_error(torch.cat(steps, 1), expected) <= FLOAT32
    cache = stock(ids[:, :prefill], use_cache=True).cache_params
    output = model(ids[:, prefill:], cache_params=cache)
    assert relative_error(output.logits, expected) <= FLOAT32
    assert output.cache_params is cache
    # Each layer's conv state is as wide as the convolution there, and holds the same inputs as stock's own.
    whole = stock(ids, use_cache=True).cache_params
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        assert relative_error(ours.conv_states[0][..., 1:], theirs.conv_states[0][..., 1:]) <= FLOAT32
        assert relative_error(ours.recurrent_states[0], theirs.recurrent_states[0]) <= FLOAT32
