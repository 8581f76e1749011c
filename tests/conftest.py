"""What every test runs under: fixed seeds, one thread per worker, NaN in uninitialised memory; a tiny model to run."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Triton reads this when a kernel is defined, so it is set before anything of mambalm is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
# Where a package is imported by another name than it is installed by.
IMPORTED_AS = {"pyyaml": "yaml"}


class TorchRandom:
    """torch's generator as hypothesis wants one, to begin every example with the same numbers."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()


class Module(pytest.Module):
    """A test module that is skipped, by name, when a package that it imports, or mambalm for it, is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        if missing := sorted(_imports(self.path) & _missing()):
            pytest.skip(f"needs {', '.join(missing)}: pip install 'mambalm[dev]'")
        return super().collect()


@cache
def _missing() -> set[str]:
    """What pyproject.toml names, in any extra, and is not installed: any other import that fails is a mistake."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in declared}
    modules = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}
    return {module for module in modules if find_spec(module) is None}


def _imports(path: Path) -> set[str]:
    """The packages that a file imports at its top, and those that the repository's own modules among them import."""
    packages: set[str] = set()
    files, seen = [path], {path}
    while files:
        named, own = _read(files.pop())
        packages |= named
        files += own - seen
        seen |= own
    return packages


@cache
def _read(path: Path) -> tuple[set[str], set[Path]]:
    """The packages that the statements at the top of a file import, and the repository's own files among them."""
    modules: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from a import b` may name the module a.b.
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.partition(".")[0] for name in modules}, {file for name in modules for file in _own_files(name)}


@cache
def _own_files(name: str) -> list[Path]:
    """The file of a module of the repository, and those of the packages around it, which are imported first."""
    first, *rest = name.split(".")
    if first not in ("benchmarks", "mambalm", "mambalm_cli", "tests"):
        return []
    places = [(ROOT if first in ("benchmarks", "tests") else ROOT / "src") / first]
    for part in rest:
        places.append(places[-1] / part)
    candidates = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return [file for file in candidates if file.is_file()]


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return Module.from_parent(parent, path=module_path)


def pytest_configure() -> None:
    # Workers share the cores, and at the sizes of these tests one thread is the fastest.
    torch.set_num_threads(1)
    if find_spec("hypothesis") is not None:
        from hypothesis import register_random, settings

        settings.register_profile("mambalm", deadline=None, derandomize=True, max_examples=20, print_blob=True)
        settings.load_profile("mambalm")
        register_random(TORCH_RANDOM)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that reading what nothing wrote shows in the result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 300 tokens; `<end>` is 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = ["def quicksort(numbers): return sorted(numbers)\n", "héllo wörld, 😀 the quick brown fox\n"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, min_frequency=1, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random Mamba in eval mode whose greedy text is not one token repeated."""
    from transformers import MambaConfig

    from mambalm.models import MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": len(tiny_tokenizer), "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
    return MambaForCausalLM(MambaConfig(**sizes, eos_token_id=0, pad_token_id=0, initializer_range=0.5)).eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model and its tokenizer in a folder, in transformers' format."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A process group of one, for what is sharded."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield DeviceMesh("cpu", [0])
    finally:
        dist.destroy_process_group()
