"""Optimisation: which parameters decay, learning rates by tokens, the step, checkpoints that survive a kill."""
