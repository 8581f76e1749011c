"""Fine-tuning with LoRA, on weights as they are or in 4 bits (QLoRA), for recipes and by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambalm.models.adapters import AdapterReport, attach_adapter
from mambalm.models.common import MambalmForCausalLM
from mambalm.models.formats import CheckpointError, detect
from mambalm.models.formats.io import written_whole
from mambalm.models.loading import FAMILIES, load, locate
from mambalm.models.quiet import without_bars
from mambalm.models.writing import share

if TYPE_CHECKING:
    from peft import PeftModel

# Where this is true, bitsandbytes 0.50 rearranges a layer's weights on a CPU at its first forward in eval mode: from
# then on no gradient passes through it, and every state_dict() changes the weights.
_REPACKS = "support_avx512bf16_for_cpu"


@dataclass(frozen=True)
class Adapter:
    """What is put on a model.

    Attributes:
        rank, alpha, dropout: LoRA's; what an adapter adds is scaled by alpha / rank.
        targets: last names of projections (in_proj, x_proj, dt_proj, out_proj, fc1, fc2); None takes all.
        four_bits: keep the large projections beneath in bitsandbytes' NF4; x_proj, dt_proj, the convolution, embeddings
            and head stay as they are.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: Sequence[str] | None = None
    four_bits: bool = False


@dataclass(frozen=True)
class Adapted:
    """A model with adapters.

    Attributes:
        model: the model itself, its projections wrapped in place; only adapters have ``requires_grad``.
        peft: PEFT's view of it, which saves the adapters alone.
        report: what is covered.
    """

    model: MambalmForCausalLM
    peft: PeftModel
    report: AdapterReport

    def save(self, folder: str | os.PathLike[str], state: Mapping[str, Tensor] | None = None) -> Path:
        """Write the adapters, for `mambalm.models.load_adapter` and PEFT; the folder appears when it is complete.

        Args:
            folder: where; one that is there is replaced.
            state: the tensors by their names in ``model``, where it is sharded; None takes its own.

        Raises:
            OSError: it could not be written; what the folder held is intact.
        """
        prefix = "base_model.model."
        tensors = None if state is None else {f"{prefix}{name}": tensor for name, tensor in state.items()}
        with written_whole(Path(folder), overwrite=True) as incomplete:
            self.peft.save_pretrained(str(incomplete), state_dict=tensors)
            share(incomplete, "adapter_config.json")
        return Path(folder)

    def merged(self) -> MambalmForCausalLM:
        """The model with the adapters added to its weights; the adapters are used up.

        Raises:
            ValueError: the weights beneath have 4 bits, which adding to them would round once more.
        """
        if getattr(self.model, "is_quantized", False):
            raise ValueError(
                "adapters on 4-bit weights are not merged: save them, and load them on the full checkpoint"
            )
        merged = self.peft.merge_and_unload()
        assert isinstance(merged, MambalmForCausalLM)
        return merged


def start(
    path_or_hub_id: str, adapter: Adapter, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Adapted:
    """Load a checkpoint and put adapters on it; they are float32, the weights beneath are frozen.

    Args:
        path_or_hub_id: as for `mambalm.load`; with ``four_bits`` a folder or repository in transformers' format.
        adapter: what is put on it.
        device: where it runs.
        dtype: of the weights beneath; None keeps each one's in the file.

    Raises:
        CheckpointError: the checkpoint does not load, or is not in transformers' format and is to be in 4 bits.
        ValueError: a target that matches no projection.
        ImportError: PEFT or, for 4 bits, bitsandbytes is not installed.
    """
    if adapter.four_bits:
        return put_on(load_four_bits(path_or_hub_id, device, dtype, dtype or torch.bfloat16), adapter)
    return put_on(load(path_or_hub_id, dtype=dtype, device=device), adapter)


def put_on(model: MambalmForCausalLM, adapter: Adapter) -> Adapted:
    """Put adapters on a model, in place.

    Raises:
        ValueError: a target that matches no projection.
        ImportError: PEFT is not installed.
    """
    import peft

    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=None if adapter.targets is None else list(adapter.targets),
        task_type="CAUSAL_LM",
    )
    adapted, report = attach_adapter(model, config)
    for module in model.modules():
        if hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Adapted(model, adapted, report)


def load_four_bits(
    path_or_hub_id: str, device: torch.device | str, dtype: torch.dtype | None, compute_dtype: torch.dtype
) -> MambalmForCausalLM:
    """Load a checkpoint with its large projections in bitsandbytes' NF4.

    Args:
        path_or_hub_id: a folder or repository in transformers' format.
        device: where it runs.
        dtype: of all other weights; None keeps each one's in the file.
        compute_dtype: in which the 4-bit weights are multiplied.

    Raises:
        CheckpointError: the checkpoint does not load, or is not in transformers' format.
        ImportError: bitsandbytes is not installed.
        ValueError: the device is a CPU, and a projection has a size that bitsandbytes cannot multiply there.
    """
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    format, source = detect(locate(path_or_hub_id))
    if format.NAME != "transformers":
        raise CheckpointError(
            f"{source.folder} is in {format.NAME}'s format, and 4 bits are made of transformers': rewrite it with "
            "`mambalm convert`"
        )
    family = FAMILIES[type(format.read(source).config)]
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
    device = torch.device(device)
    with without_bars():
        model = family.from_pretrained(
            source.folder, quantization_config=how, dtype=dtype or "auto", device_map={"": device}
        )
    for name, module in model.named_modules():
        if device.type != "cpu" or not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        if module.in_features % 64 or module.out_features % 32:
            raise ValueError(
                f"{name} has {module.in_features} inputs and {module.out_features} outputs, and on a CPU bitsandbytes "
                "multiplies 4-bit weights of multiples of 64 and 32 alone: train without four_bits, or on a GPU"
            )
    assert isinstance(model, MambalmForCausalLM)
    return model
