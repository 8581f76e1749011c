"""Measures of what a model knows."""
