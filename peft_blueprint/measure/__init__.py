"""Measure where the gradient of a model on data lives: model and batches to `Influence` to `Blueprint`."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
