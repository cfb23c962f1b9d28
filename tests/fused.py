"""Mark of tests that need experts fused into one parameter, as in transformers 5."""

import pytest

from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.testing import tiny_mixtral


HAS_FUSED = any(submodule.form == "experts" for submodule in find_submodules(tiny_mixtral(layers=1)))
needs_fused = pytest.mark.skipif(not HAS_FUSED, reason="experts are linear layers here")
