"""Track the cost and gain of a training run, and decide when to stop it."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
