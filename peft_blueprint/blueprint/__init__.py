"""The gradient blueprint, every form of its file, and the formulas of the paper; no torch."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
