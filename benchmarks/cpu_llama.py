"""The llama.cpp side of `benchmarks.cpu`: runs under a Python that has llama-cpp-python and gguf, and nothing of ours.

`cpu_llama.py export FOLDER FILE` writes the float32 weights that `benchmarks.cpu` left in FOLDER as GGUF,
`quantize FILE TYPE OUT` rewrites them, `serve FILE THREADS [plain]` answers on standard input.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}


def export(folder: Path, file: Path) -> None:
    """Write FOLDER's config.json and weights.npz (transformers' names) as GGUF, without a vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    weights = np.load(folder / "weights.npz")
    arch = config["model_type"]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(2**20)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_state_size(config["state_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if arch == "mamba":
        writer.add_ssm_inner_size(config["intermediate_size"])
        writer.add_ssm_time_step_rank(config["time_step_rank"])
    else:
        writer.add_ssm_inner_size(config["num_heads"] * config["head_dim"])
        writer.add_ssm_time_step_rank(config["num_heads"])
        writer.add_ssm_group_count(config["n_groups"])
    for name in weights.files:
        target, value = _tensor(name, weights[name], config)
        writer.add_tensor(target, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor(name: str, value: np.ndarray, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    """llama.cpp's name and shape of a weight."""
    outside = {"backbone.embeddings.weight": "token_embd.weight", "backbone.norm_f.weight": "output_norm.weight"}
    if name in outside:
        return outside[name], value
    _, _, layer, *rest = name.split(".")
    inside = ".".join(rest).removeprefix("mixer.")
    second = config["model_type"] == "mamba2"
    if inside == "A_log":
        value = -np.exp(value)
        return f"blk.{layer}.ssm_a", value[:, None] if second else value
    if inside == "D":
        return f"blk.{layer}.ssm_d", value[:, None] if second else value
    if inside == "conv1d.weight":
        return f"blk.{layer}.ssm_conv1d.weight", value[:, 0]
    if inside == "norm.weight" and rest[0] == "mixer":
        return f"blk.{layer}.ssm_norm.weight", value.reshape(config["n_groups"], -1)
    plain = {
        "norm.weight": "attn_norm.weight",
        "in_proj.weight": "ssm_in.weight",
        "conv1d.bias": "ssm_conv1d.bias",
        "x_proj.weight": "ssm_x.weight",
        "dt_proj.weight": "ssm_dt.weight",
        "dt_proj.bias": "ssm_dt.bias",
        "dt_bias": "ssm_dt.bias",
        "out_proj.weight": "ssm_out.weight",
    }
    return f"blk.{layer}.{plain[inside]}", value


def quantize(source: str, kind: str, out: str) -> None:
    """Rewrite a GGUF file in another type."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind]
    parameters.nthread = 1
    assert llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)) == 0


class Model:
    """A GGUF model that reads tokens."""

    def __init__(self, file: str, threads: int, *, rearranged: bool = True) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = rearranged
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), parameters)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 4096, 2048, 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)

    def read(self, tokens: list[int]) -> None:
        """Read tokens after what was read before, up to the logits of the last."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        assert llama_cpp.llama_get_logits_ith(self._context, -1)[0] is not None

    def clear(self) -> None:
        """Forget everything."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def logits(self, size: int) -> np.ndarray:
        """The logits of the last token."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (size,)).copy()


def serve(file: str, threads: int, plain: bool) -> None:
    """Answer `prefill N` and `decode N` with seconds, `logits N V` with the logits after tokens 1..N.

    ``plain``: no rearranged weights (AMX) but for decoding, where the CPU claims AMX and the system does not allow it.
    """
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    decoder = Model(file, threads)
    reader = Model(file, threads, rearranged=False) if plain else decoder
    print("ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        count = int(numbers[0])
        model = decoder if what == "decode" else reader
        model.clear()
        start = time.perf_counter()
        if what == "decode":
            model.read([1])
            start = time.perf_counter()
            for token in range(count):
                model.read([token % 1000])
        else:
            model.read([1 + token % 1000 for token in range(count)])
        seconds = time.perf_counter() - start
        print(json.dumps(model.logits(int(numbers[1])).tolist() if what == "logits" else seconds), flush=True)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "export":
        export(Path(arguments[0]), Path(arguments[1]))
    elif command == "quantize":
        quantize(*arguments)
    else:
        serve(arguments[0], int(arguments[1]), arguments[2:] == ["plain"])
