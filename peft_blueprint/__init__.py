"""Measure where a model's gradient lives, publish it, and train less of the model for the same result.

Names are imported when first used, so that reading a blueprint does not wait for torch. `BlueprintConfig` registers
the method BLUEPRINT with PEFT; when PEFT is already imported, importing this package does so at once.
"""

import importlib
import logging
import sys

import lazy_loader


__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# PEFT imports bitsandbytes in every process, which warns on CPUs that a kernel for inference is missing
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

if "peft" in sys.modules:
    importlib.import_module(".place.config", __name__)
