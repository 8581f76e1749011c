"""Language models: transformers' `PreTrainedModel` on transformers' configs and parameter names, with mambalm's layers.

The classes are imported from their modules (`mambalm.models.mamba`, ...), or by name from here when asked for, so that
importing this package imports no transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mambalm.models.quiet import quietly

_MODULES = {
    "FalconMambaForCausalLM": "falcon_mamba",
    "FalconMambaModel": "falcon_mamba",
    "Mamba2ForCausalLM": "mamba2",
    "Mamba2Model": "mamba2",
    "MambaForCausalLM": "mamba",
    "MambaModel": "mamba",
    "HybridConfig": "hybrid_config",
    "MambaHybridForCausalLM": "hybrid",
    "MambaHybridModel": "hybrid",
    "attach_adapter": "adapters",
    "load": "loading",
    "load_adapter": "adapters",
    "merge_adapter": "adapters",
    "register": "registration",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quietly():
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
