"""transformers' `generate`, and the caches that it keeps a model's state in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import StaticCache

import mambalm
from mambalm.models.cache import StateCache
from tests.helpers import FLOAT32, relative_error
from tests.models.tiny import FAMILIES, greedy, tokens

pytestmark = pytest.mark.usefixtures("portable")
families = pytest.mark.parametrize("name", FAMILIES)


@families
@pytest.mark.parametrize("left", [True, False])
def test_padded_prompts_generate_what_each_generates_alone(name: str, left: bool) -> None:
    model = FAMILIES[name].model()
    prompts = [tokens(1, length, seed=length) for length in (9, 4, 1)]
    batch, mask = tokens(3, 9, seed=77), torch.zeros(3, 9, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        place = slice(9 - prompt.shape[1], 9) if left else slice(0, prompt.shape[1])
        batch[i, place], mask[i, place] = prompt[0], 1
    if left:
        # The last position of each row is real: generate reads the next token off it.
        found = greedy(model, batch, attention_mask=mask)
        assert torch.equal(found, torch.cat([greedy(model, prompt) for prompt in prompts]))
    cache = model(batch, attention_mask=mask, use_cache=True).cache_params
    step = tokens(3, 1, seed=8)
    expected = [model(torch.cat([p, t[None]], 1)).logits[0, -1] for p, t in zip(prompts, step, strict=True)]
    assert relative_error(model(step, cache_params=cache).logits[:, -1], torch.stack(expected)) <= FLOAT32


@families
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation_resumes_from_a_state(name: str, arguments: dict[str, Any]) -> None:
    model, ids = FAMILIES[name].model(), tokens(2, 12)
    expected = greedy(model, ids, **arguments)
    state = model(ids[:, :7], cache_params=model.init_state(2)).cache_params
    assert torch.equal(greedy(model, ids[:, 7:], cache_params=state, **arguments), expected)
    if not arguments:
        cache = model(ids[:, :7], use_cache=True).cache_params
        assert isinstance(cache, StateCache if name == "hybrid" else DynamicCache)
        assert torch.equal(greedy(model, ids[:, 7:], cache_params=cache), expected)


def test_the_cache_has_both_of_its_names() -> None:
    """transformers says `cache` from 5.24 on, and said `cache_params` before."""
    model, ids = FAMILIES["mamba"].model(), tokens(2, 5)
    state = model(ids[:, :3], cache=model.init_state(2)).cache
    assert isinstance(state, mambalm.State)
    for call in (model, model.backbone):
        output = call(ids[:, 3:], cache=state)
        assert output["cache"] is output["cache_params"] is output.cache_params
        assert "cache" in output
        assert "cache_params" in output
        assert torch.equal(output[0], call(ids[:, 3:], cache_params=state)[0])
        with pytest.raises(ValueError, match="give one of cache_params and cache"):
            call(ids, cache=state, cache_params=state)
    assert torch.equal(greedy(model, ids[:, 3:], cache=state), greedy(model, ids))


@families
def test_generation_without_a_cache_and_by_sampling(name: str) -> None:
    model, ids = FAMILIES[name].model(), tokens(2, 7)
    assert torch.equal(greedy(model, ids, use_cache=False), greedy(model, ids))
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, do_sample=True, top_k=9, max_new_tokens=5, use_cache=use_cache))
    assert torch.equal(drawn[0], drawn[1])


def test_beams_move_with_the_hybrids_state() -> None:
    """Without a cache every beam is read anew, so nothing can be mixed up there."""
    model, ids = FAMILIES["hybrid"].model(), tokens(2, 7)
    assert torch.equal(greedy(model, ids, num_beams=4, use_cache=False), greedy(model, ids, num_beams=4))


def test_a_static_cache_serves_the_recurrent_families() -> None:
    model, ids = FAMILIES["mamba2"].model(), tokens(2, 7)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), greedy(model, ids))
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(ids[:, :4], cache_params=cache)
    assert relative_error(model(ids[:, 4:], cache_params=cache).logits, model(ids).logits[:, 4:]) <= FLOAT32


def test_a_cache_that_was_reset_is_empty() -> None:
    model, ids = FAMILIES["mamba"].model(), tokens(2, 7)
    expected = model(ids).logits
    for cache in (model(ids).cache_params, StateCache(model(ids, cache_params=model.init_state(2)).cache_params)):
        cache.reset()
        assert relative_error(model(ids, cache_params=cache).logits, expected) == 0


def test_a_state_cache_keeps_and_repeats_rows() -> None:
    model, ids = FAMILIES["hybrid"].model(), tokens(2, 7)
    cache = StateCache()
    assert (cache.get_seq_length(), cache.batch_size, cache.has_previous_state()) == (0, -1, False)
    model(ids, cache_params=cache)
    assert (cache.get_seq_length(), cache.batch_size, cache.has_previous_state()) == (7, 2, True)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    step = tokens(2, 1, seed=4)
    expected = model(torch.cat([ids.flip(0), step], 1)).logits[:, -1:]
    assert relative_error(model(step, cache_params=cache).logits, expected) <= FLOAT32
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def test_caches_that_do_not_fit_say_so() -> None:
    model, ids = FAMILIES["mamba"].model(), tokens(2, 5)
    cache = model(ids).cache_params
    with pytest.raises(ValueError, match="the state has 2 rows and the input 3"):
        model(tokens(3, 5), cache_params=cache)
    with pytest.raises(ValueError, match="holds no layers"):
        model(ids, cache_params=DynamicCache())
    hybrid = FAMILIES["hybrid"].model()
    with pytest.raises(ValueError, match="holds DynamicLayer layers"):
        hybrid(ids, cache_params=DynamicCache(config=hybrid.config))
    with pytest.raises(ValueError, match="cache_params is dict"):
        model(ids, cache_params={})
    recording = DynamicCache(config=model.config)
    recording.activate_past_recording()
    with pytest.raises(ValueError, match="records past inputs"):
        model(ids, cache_params=recording)


def test_no_gradient_goes_through_a_cache() -> None:
    model, ids = FAMILIES["mamba"].model(), tokens(2, 5)
    cache = model(ids, use_cache=True).cache_params
    assert not cache.layers[0].recurrent_states[0].requires_grad
    model(ids, cache_params=cache).logits.sum().backward()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_float64_model_keeps_its_state_in_float64(name: str) -> None:
    model, ids = FAMILIES[name].model().double(), tokens(2, 11)
    whole = model(ids, use_cache=False).logits[:, 5:]
    for cache in (None, model.init_state(2)):
        before = model(ids[:, :5], cache_params=cache, use_cache=True).cache_params
        assert relative_error(model(ids[:, 5:], cache_params=before).logits, whole) <= 1e-14
    for fresh, after in zip(model.init_state(2).layers, before.layers, strict=True):
        assert [t.dtype for t in vars(fresh).values() if t is not None] == [
            t.dtype for t in vars(after).values() if t is not None
        ]


def test_steps_behind_a_padded_prompt_take_no_mask() -> None:
    """Each would be read as data, for which a GPU waits."""
    model, ids, masks = FAMILIES["mamba"].model(), tokens(2, 5), []
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model.backbone.register_forward_pre_hook(
        lambda module, arguments, options: masks.append(options["packing"] is not None), with_kwargs=True
    )
    asked: list[bool] = []
    model.register_forward_pre_hook(
        lambda module, arguments, options: asked.append(options.get("attention_mask") is not None), with_kwargs=True
    )
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert masks == asked == [True, False, False]
