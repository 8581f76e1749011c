"""Speed and memory of the ops: `python -m benchmarks`, or `make bench`."""
