"""Benchmarks behind RESULTS.md; run one with `python -m benchmarks NAME`."""
