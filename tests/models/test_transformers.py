"""What transformers does with a model: pipeline, files, Trainer, checkpointing, placement, quantisation."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import mambalm
from tests.helpers import FLOAT32, assert_close, relative_error
from tests.models.tiny import FAMILIES, VOCABULARY, greedy, tokens

pytestmark = pytest.mark.usefixtures("portable")
families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_auto_classes_return_ours_after_register(name: str, registered: None, tmp_path: Path) -> None:
    model = FAMILIES[name].model().bfloat16()
    model.save_pretrained(tmp_path)
    mambalm.register()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map="auto")
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.bfloat16
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), 0)
    assert loaded.generate(tokens(1, 4), do_sample=True, max_new_tokens=3).shape == (1, 7)
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is type(model.backbone)
    assert_close(dict(backbone.bfloat16().state_dict()), dict(model.backbone.state_dict()), 0)


def test_nothing_is_registered_unasked(tmp_path: Path) -> None:
    FAMILIES["mamba"].model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.MambaForCausalLM


def test_pipeline(registered: None, tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side="left")
    model = FAMILIES["mamba"].model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generator.model) is type(model)
    prompts = ["w3 w9 w27", "w5"]
    found = generator(prompts, batch_size=2, max_new_tokens=4, do_sample=False, return_full_text=False)
    for prompt, ((answer,)) in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert tokenizer(answer["generated_text"]).input_ids == greedy(model, ids, 4)[0].tolist()


def test_a_missing_tensor_is_initialised_and_the_others_stay(tmp_path: Path) -> None:
    """transformers initialises the whole mixer of a missing tensor: nothing that was read may be drawn anew."""
    model = FAMILIES["mamba"].model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = {f"backbone.layers.0.mixer.{name}" for name in ("D", "dt_proj.bias")}
    save_file({k: v for k, v in tensors.items() if k not in missing}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) == (name not in missing), name
    mixer = loaded.backbone.layers[0].mixer
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    steps = nn.functional.softplus(mixer.dt_proj.bias)
    assert ((steps >= 1e-3 * 0.99) & (steps <= 0.1 * 1.01)).all()


def test_initial_values_survive_transformers_initialisation() -> None:
    torch.manual_seed(0)
    model = FAMILIES["mamba"].ours(FAMILIES["mamba"].config(hidden_size=64, rescale_prenorm_residual=True))
    mixer = model.backbone.layers[0].mixer
    assert torch.equal(mixer.A_log, torch.arange(1.0, 5).log().expand(128, 4))
    assert torch.equal(mixer.D, torch.ones(128))
    steps = nn.functional.softplus(mixer.dt_proj.bias)
    assert ((steps >= 1e-3 * 0.99) & (steps <= 0.1 * 1.01)).all()
    bound = 128**-0.5 / 2**0.5
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert abs(model.get_input_embeddings().weight.std().item() - model.config.initializer_range) < 0.01
    assert model.lm_head.weight is model.get_input_embeddings().weight


@families
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, ids = FAMILIES[name].model().train(), tokens(2, 9)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        state = model(ids[:, :4], cache_params=model.init_state(2)).cache_params
        model(ids[:, 4:], labels=ids[:, 4:], cache_params=state).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable()
    calls = []
    for layer in model.backbone.layers:
        layer.mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_close(gradients(), expected, 0)
    assert len(calls) == 2 * 2 * len(model.backbone.layers)


@families
@torch.no_grad()
def test_offloaded_parameters_come_when_they_are_called_for(name: str) -> None:
    """As with device_map="auto" and less memory than the model takes: accelerate's hooks bring each module's own."""
    model, ids = FAMILIES[name].model(), tokens(2, 9)
    expected, continuation = model(ids, labels=ids), greedy(model, ids)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    output = offloaded(ids, labels=ids)
    assert relative_error(output.logits, expected.logits) <= FLOAT32
    assert relative_error(output.loss, expected.loss) <= FLOAT32
    assert torch.equal(greedy(offloaded, ids), continuation)


@families
def test_trainer(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model()
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 10)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda prediction: {"shape": prediction.predictions.shape},
    )
    with torch.no_grad():
        model.eval()
        first = sum(model(row["input_ids"][None], labels=row["labels"][None]).loss for row in data) / 8
    before = trainer.evaluate()
    assert abs(before["eval_loss"] - float(first)) < 1e-4
    assert before["eval_shape"] == (8, 10, VOCABULARY)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first - 0.3
    saved = type(model).from_pretrained(tmp_path / "checkpoint-6")
    assert_close(dict(saved.state_dict()), dict(model.state_dict()), 0)


@families
def test_transformers_own_packing(name: str) -> None:
    """DataCollatorWithFlattening says by position_ids where the documents are."""
    model = FAMILIES[name].model()
    rows = [tokens(length, seed=length) for length in (7, 2, 4)]
    batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    separate = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows) / 10
    assert batch["input_ids"].shape == (1, 13)
    assert relative_error(model(**batch).loss, separate) <= FLOAT32


@families
def test_autocast(name: str) -> None:
    """The parameters' gradients stay float32, and the loss is off by bfloat16's rounding only."""
    model, ids = FAMILIES[name].model().train(), tokens(2, 9)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model(ids[:, :4], cache_params=model.init_state(2))
        output = model(ids, labels=ids)
        model(ids[:, 4:], cache_params=first.cache_params).logits.sum().backward()
    assert relative_error(output.loss, expected) < 4e-3
    assert output.logits.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@families
def test_one_graph(name: str) -> None:
    """torch.compile takes the forward pass, the loss, the gradients and a state as one graph."""
    model, ids = FAMILIES[name].model(), tokens(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = model(tokens(2, 3), cache_params=model.init_state(2)).cache_params
    before = before.detach()
    results = []
    for call in (model, compiled):
        model.zero_grad()
        output = call(ids, labels=ids, cache_params=before)
        output.loss.backward()
        gradients = {k: parameter.grad.clone() for k, parameter in model.named_parameters()}
        results.append({"loss": output.loss, "position": output.cache_params.position} | gradients)
    assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_one_graph_of_packed_documents(name: str) -> None:
    """Attention alone needs to know how long the longest document is."""
    model, ids, offsets = FAMILIES[name].model(), tokens(1, 9), torch.tensor([0, 4, 4, 9])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    arguments = {"labels": ids, "cu_seqlens": offsets, "cache_params": model.init_state(3)}
    expected, found = model(ids, **arguments), compiled(ids, **arguments)
    assert_close({"logits": found.logits, "loss": found.loss}, {"logits": expected.logits, "loss": expected.loss})


def test_a_mask_breaks_the_graph_by_name() -> None:
    model, ids = FAMILIES["mamba"].model(), tokens(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="read as data"):
        compiled(ids, attention_mask=torch.ones_like(ids))


def test_the_head_of_an_adapter_counts_in_the_loss() -> None:
    """A head that is no plain Linear is called, not read: its weight is not all that it computes with."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, ids = FAMILIES["falcon_mamba"].model(), tokens(2, 9)
    head = Doubled(16, VOCABULARY, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    output = model(ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert relative_error(output.loss, expected) <= FLOAT32


def test_what_is_not_built_is_refused_by_name() -> None:
    for name, changes, message in (
        ("mamba", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("hybrid", {"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
        ("hybrid", {"attn_layer_idx": [2]}, r"attn_layer_idx names \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            FAMILIES[name].model(**changes)


def test_importing_the_package_of_models_brings_no_transformers() -> None:
    script = "import sys, mambalm.models; assert 'transformers' not in sys.modules"
    source = str(Path(mambalm.__file__).parents[1])
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": source})
    with pytest.raises(AttributeError, match="Mamba3"):
        mambalm.models.Mamba3  # noqa: B018


def test_configs_round_trip(tmp_path: Path) -> None:
    for name, family in FAMILIES.items():
        config = family.config()
        config.save_pretrained(tmp_path / name)
        again = type(config).from_pretrained(tmp_path / name)
        assert again.to_dict() == config.to_dict() | {"transformers_version": transformers.__version__}
        assert copy.deepcopy(config).layer_types == config.layer_types
