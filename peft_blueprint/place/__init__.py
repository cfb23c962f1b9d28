"""Decide where adapters go: blueprint, model and budget to `Placement` to `BlueprintConfig`."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
