"""What a decode step of a few rows takes beside `triton_steps`; `gluon.py` for Hopper GPUs, there is no other."""
