"""Recipes: every shipped one, sizes beside the published, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambalm.training.model import size_of
from mambalm.training.rates import LearningRates
from mambalm.training.recipe import Recipe, parse_count
from mambalm.training.recipe_files import dump, load_recipe, shipped

# Parameters of the published checkpoints, as their model cards or weights say.
PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba-2.8b-slimpj": 2_768_345_600,
    "falcon-mamba-7b": 7_272_665_088,
}
ROUNDED = {"mamba2-2.7b": 2.7, "mamba2attn-2.7b": 2.7, "transformerpp-2.7b": 2.7, "mamba-7b-rw": 7.15}


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_is_valid_and_its_rates_end_at_the_floor(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    rates = LearningRates(recipe)
    for first, last, schedule in recipe.schedules():
        stage = recipe.stages[last - 1]
        assert rates(last - 1, stage.tokens, stage.batch) == pytest.approx(schedule.floor, abs=1e-12)
        full = recipe.stages[first]
        assert rates(first, schedule.warmup, full.batch) == pytest.approx(schedule.peak)


@pytest.mark.parametrize("name", [name for name in shipped() if not name.endswith("continual")])
def test_sizes_are_the_published(name: str) -> None:
    size = size_of(load_recipe(name)).parameters
    if name in PUBLISHED:
        assert size == PUBLISHED[name]
    elif name in ROUNDED:
        assert size / 1e9 == pytest.approx(ROUNDED[name], abs=0.05)
    elif "28m" in name:
        assert 27e6 < size < 28.1e6
    elif "6m" in name:
        assert 6e6 < size < 7e6


def test_the_list_is_complete() -> None:
    small = {f"{kind}-tiny" for kind in ("mamba", "mamba2", "transformerpp")}
    python = {"mamba-28m-python", "mamba-6m-python", "transformerpp-28m-python"}
    expected = {*PUBLISHED, *ROUNDED, "kotomamba-2.8b", "kotomamba-2.8b-continual", *small, *python}
    assert expected == set(shipped())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.peek=1", r"unknown key schedule\.peek; did you mean peak\?"),
        ("stages.long.contxt=3", r"unknown key stages\.1\.contxt; did you mean context\?"),
        ("optimiser.clip=1", r"unknown key optimiser; did you mean optimizer\?"),
        ("stages.middle.tokens=3", "there is no item 'middle'; choose short, long"),
        ("schedule.peak=high", r"schedule\.peak: .* got 'high'"),
        ("schedule.peak", "is no override: write key=value"),
        ("name.part=1", r"name"),
        ("schedule.floor=1", "falls from its peak to its floor"),
        ("schedule.shape=exponential", "give it a floor"),
        ("schedule.kind=cosine", "decay .* belongs to kind: wsd"),
        ("stages.short.ramp.start=3", r"ramp\.start=3 must divide the full batch of 16"),
        ("stages.long.tokens=0", r"^recipe mamba-tiny: stages\.1\.tokens: Input should be greater than 0, got 0$"),
        ("stages=[]", "stages: Tuple should have at least 1 item"),
        ("schedule.decay=1G", "the stages from short on have 250,000"),
        ("seed=99999999999999999999", r"seed: Input should be less than 9223372036854775808"),
        ("parallel={mode: fsdp, shard_size: 2}", r"parallel\.shard_size is of mode hsdp; fsdp shards over all ranks"),
    ],
)
def test_what_does_not_fit_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("mamba-tiny", [override])


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe 'mamba-tny'; did you mean mamba-tiny\?"):
        load_recipe("mamba-tny")
    with pytest.raises(ValueError, match="there is no recipe file"):
        load_recipe(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(ValueError, match="is its own base"):
        load_recipe(str(tmp_path / "mine.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(str(tmp_path / "bad.yaml"))
    recipe = load_recipe("mamba-tiny", ["model.config.hiden_size=3"])
    with pytest.raises(ValueError, match=r"model\.config\.hiden_size of family mamba; did you mean hidden_size\?"):
        size_of(recipe)
    for change, message in (
        ("num_hidden_layers=0", r"model\.config\.num_hidden_layers is 0: it must be 1 at least"),
        ("hidden_size=16.5", r"model\.config does not fit family mamba: .*'hidden_size' expected int, got float"),
    ):
        with pytest.raises(ValueError, match=message):
            size_of(load_recipe("mamba-tiny", [f"model.config.{change}"]))


def test_a_file_builds_on_a_shipped_recipe_and_on_a_file(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("base: mamba-tiny\nname: one\nschedule: {peak: 1e-3}\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\nname: two\n")
    recipe = load_recipe(str(tmp_path / "two.yaml"), ["stages.long.tokens=0.2M", "seed=3"])
    assert (recipe.name, recipe.schedule.peak, recipe.schedule.warmup) == ("two", 1e-3, 20_000)
    assert (recipe.stages[1].tokens, recipe.seed) == (200_000, 3)
    (tmp_path / "three.yaml").write_text(dump(recipe))
    assert load_recipe(str(tmp_path / "three.yaml")) == recipe


@pytest.mark.parametrize(
    ("text", "count"), [("300G", 300 * 10**9), ("0.5M", 500_000), ("2e9", 2 * 10**9), ("1_000", 1000), (3, 3)]
)
def test_counts(text: object, count: int) -> None:
    assert parse_count(text) == count
    with pytest.raises(ValueError, match=r"stages\.0\.tokens: a count is a number, .*, got 'a few'"):
        load_recipe("mamba-tiny", ["stages.short.tokens=a few"])


def test_batch_ramp_and_batch_scaling_of_falcon_mamba() -> None:
    recipe = load_recipe("falcon-mamba-7b")
    first, rates = recipe.stages[0], LearningRates(recipe)
    assert [first.batch_at(tokens * 10**9) for tokens in (0, 25, 50, 2000)] == [128, 1024, 2048, 2048]
    assert all(first.batch_at(tokens * 10**9) % 128 == 0 for tokens in range(50))
    # The noise temperature of Adam, rate / sqrt(batch), stays what it is at the full batch.
    assert rates(0, 25e9, 1024) / 1024**0.5 == pytest.approx(6.4e-4 / 2048**0.5)
    # The decay halves the rate eight times over 500G tokens.
    assert rates(3, 250e9, 2048) == pytest.approx(6.4e-4 / 16)
    assert rates(4, 5e9 * 0.51, 256) == pytest.approx(1e-5 * 0.5, rel=0.01)
