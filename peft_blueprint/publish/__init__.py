"""Publish a blueprint or a run: model cards, safetensors headers, Hub commits, report pages, adapters for servers."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
