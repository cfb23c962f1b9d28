"""Benchmarks behind docs/results; run one with `python -m benchmarks NAME`."""
