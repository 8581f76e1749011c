"""Benchmarks of whole models: speed of generating, longest prompt under a memory cap, constant speed, restored states.

Each measures one `Subject` and returns what its JSON file holds; `figures` draws it.
"""

from mambalm.diagnostics.benchmark.generate import measure_generate
from mambalm.diagnostics.benchmark.memory import MODES, measure_memory
from mambalm.diagnostics.benchmark.restore import measure_restore
from mambalm.diagnostics.benchmark.subjects import Subject, checkpoint_subject, random_subject, transformer_beside
from mambalm.diagnostics.benchmark.throughput import measure_throughput

__all__ = [
    "MODES",
    "Subject",
    "checkpoint_subject",
    "measure_generate",
    "measure_memory",
    "measure_restore",
    "measure_throughput",
    "random_subject",
    "transformer_beside",
]
