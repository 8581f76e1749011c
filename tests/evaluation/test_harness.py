"""The lm-evaluation-harness: its numbers with our models are those of its own adapter with transformers' models."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook, CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from mambalm.evaluation.harness import HarnessModel
from mambalm_cli import app

# Few-shot examples before each question, and texts with nothing before them.
EXAMPLES = "def quicksort(numbers): return sorted(numbers)\n" * 3
PAIRS = [(EXAMPLES + "the quick", answer) for answer in (" brown", " fox", " brown fox jumps")]
PAIRS += [(EXAMPLES + "héllo ", "wörld"), ("", "def"), ("the quick brown", " fox")]


def ask(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def ours(tiny_checkpoint: Path) -> LM:
    made = get_model("mambalm").create_from_arg_string(f"pretrained={tiny_checkpoint}", {"batch_size": 4})
    assert type(made) is HarnessModel
    return made


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> LM:
    with warnings.catch_warnings(action="ignore"):
        stock = transformers.MambaForCausalLM.from_pretrained(tiny_checkpoint)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint, pad_token="<end>")
        return HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=1, max_length=512)


def test_loglikelihoods(ours: LM, theirs: LM) -> None:
    found, expected = (model.loglikelihood(ask("loglikelihood", *PAIRS)) for model in (ours, theirs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_whole_documents(ours: LM, theirs: LM) -> None:
    texts = [(EXAMPLES * 2,), ("the quick brown fox",), ("h",)]
    found, expected = (model.loglikelihood_rolling(ask("loglikelihood_rolling", *texts)) for model in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-5)
    assert ours.loglikelihood_rolling(ask("loglikelihood_rolling", ("",))) == [0.0]


def test_generation_ends_where_it_is_told(ours: LM, theirs: LM) -> None:
    prompts = [EXAMPLES + "the quick", EXAMPLES + "héllo", "brown"]
    whole = theirs.generate_until(ask("generate_until", *((text, {"max_gen_toks": 12}) for text in prompts)))
    assert len(set(whole)) == 3
    # A stop string out of the middle of the first text: in some rows it comes, in others not.
    for settings in ({"max_gen_toks": 12}, {"until": [whole[0][3:5]], "max_new_tokens": 12}, {"until": whole[1][2]}):
        settings = {"max_gen_toks": 9, **settings} if "max_new_tokens" not in settings else settings
        asked = ask("generate_until", *((text, dict(settings)) for text in prompts))
        assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_sampling_is_by_seed_and_request(ours: LM) -> None:
    settings = {"do_sample": True, "temperature": 30.0, "top_k": 200, "max_gen_toks": 8}
    asked = ask("generate_until", *(("the quick", dict(settings)) for _ in range(5)), ("", {"max_gen_toks": 2}))
    first = ours.generate_until(asked)
    assert len(set(first[:5])) > 1, "each of a task's repeats draws anew"
    assert ours.generate_until(asked) == first
    assert ours.generate_until(asked[:1]) == first[:1]
    penalised = ask("generate_until", *((EXAMPLES, {"repetition_penalty": 1e6, "max_gen_toks": 8}),) * 2)
    text = ours.generate_until(penalised)
    ids = ours.tok_encode(text[0])
    assert text[0] == text[1] != ours.generate_until(ask("generate_until", (EXAMPLES, {"max_gen_toks": 8})))[0]
    assert not set(ids) & set(ours.tok_encode(EXAMPLES)), "what the shared beginning holds counts as well"


def test_what_is_not_understood_is_refused(tiny_checkpoint: Path, tiny_model: PreTrainedModel, ours: LM) -> None:
    with pytest.raises(ValueError, match="mambalm has no num_beams to generate with: a task may ask for until"):
        ours.generate_until(ask("generate_until", ("a", {"num_beams": 4})))
    with pytest.raises(ValueError, match="batch_size is 'auto': give a number of rows"):
        HarnessModel(str(tiny_checkpoint), batch_size="auto")
    with pytest.raises(ValueError, match="pass tokenizer, too"):
        HarnessModel(tiny_model)
    with pytest.raises(ValueError, match="has no tokens in its continuation"):
        ours.loglikelihood(ask("loglikelihood", ("a", "")))


def test_a_cache_holds_every_answer(ours: LM, tmp_path: Path) -> None:
    cached = CachingLM(ours, str(tmp_path / "cache.db"))
    asked = ask("loglikelihood", *PAIRS)
    first = cached.loglikelihood(asked)
    ours.model.forward, forward = None, ours.model.forward  # whoever calls it now fails
    try:
        assert [tuple(answer) for answer in cached.loglikelihood(asked)] == first
    finally:
        ours.model.forward = forward
        ours.set_cache_hook(CacheHook(None))


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The harness's own tasks, thousands of files, are not needed.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [{"question": f"{i} and {i}?", "choices": [str(2 * i), str(i)], "answer": i % 2} for i in range(6)]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (folder / "sums.yaml").write_text(
        "task: mambalm_sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\n"
        "test_split: test\nfewshot_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


def test_the_command(task: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    output = tmp_path / "results.json"
    arguments = ["evaluate", str(tiny_checkpoint), "mambalm_sums", "--include", str(task), "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "--shots", "2", "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert "mambalm_sums" in done.stdout
    results = json.loads(output.read_text())
    assert results["n-samples"]["mambalm_sums"] == {"original": 6, "effective": 6}
    model = HarnessModel(str(tiny_checkpoint), device="cpu")
    right = 0
    for i in range(6):
        # No few-shot examples: only that each answer's likelihood is asked for is checked here.
        answers = model.loglikelihood(ask("loglikelihood", *((f"{i} and {i}?", f" {n}") for n in (2 * i, i))))
        right += max(range(2), key=lambda n: answers[n][0]) == i % 2
    zero = CliRunner().invoke(app, [*arguments, "-o", str(output)])
    assert zero.exit_code == 0
    assert json.loads(output.read_text())["results"]["mambalm_sums"]["acc,none"] == pytest.approx(right / 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "no_such_task"], "the harness knows no no_such_task: `lm-eval ls tasks`"),
        (["{model}", "mambalm_sums", "--include", "{tmp}/none"], "none is no folder"),
        (["{model}", "mambalm_sums", "-o", "{tmp}"], "cannot be written: name a file"),
        (["{tmp}/none", "mambalm_sums", "--include", "{tmp}/tasks"], "none does not exist"),
    ],
)
def test_bad_input_is_told(
    arguments: list[str], message: str, task: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    filled = [text.format(model=tiny_checkpoint, tmp=tmp_path) for text in arguments]
    done = CliRunner().invoke(app, ["evaluate", *filled])
    assert done.exit_code == 2
    assert message in done.stderr
