"""Diagnostics: whether a model keeps the equalities, and what this machine would run."""
