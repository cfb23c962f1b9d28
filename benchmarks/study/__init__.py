"""The benchmark that decides what the library recommends: studies, arms, jobs, and what they say; see `benchmark.py`."""
