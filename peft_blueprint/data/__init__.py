"""Choose which examples to train on: read, score, scan and select them, with cross-influence."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
