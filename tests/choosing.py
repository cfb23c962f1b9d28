"""Helpers for tests of choosing data: made-up examples, a model, a call."""

import numpy as np

from peft_blueprint.data.select import select_examples
from peft_blueprint.testing import tiny_llama


def make_rows(n, seed=0, low=1, high=97, longest=24):
    """Encoded examples of varied lengths, with a prompt of three tokens."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        ids = generator.integers(low, high, generator.integers(8, longest)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return rows


def model():
    return tiny_llama(layers=2)


def choose(rows, using=None, **options):
    return select_examples(using or model(), rows, **{"progress": False, "batch_size": 4} | options)
