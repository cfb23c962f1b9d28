"""Tests, in the folders of the rooms that they test."""

from pathlib import Path


ROOT = Path(__file__).parents[1]
ROOMS = ("blueprint", "runs", "compare", "measure", "place", "place.cost", "data", "train", "publish", "cli")
