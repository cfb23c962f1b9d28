"""Random blueprints and random JSON for tests of reading and writing, and the paper's own example."""

from typing import get_args

from hypothesis import strategies as st

from peft_blueprint import Blueprint, Submodule
from peft_blueprint.blueprint.entry import Form


# Appendix A.1, its braces mended.
PAPER = """{
  "model_id": "foundation-7b",
  "training_checkpoint": 0.80,
  "layers": [
    {
      "id": "attn.0", "gradient_norm": 0.052, "alpha": 1.47, "gamma": 0.60, "k_star": 0.15,
      "domain_tags": {"general": 1.0, "bio": 0.79, "legal": 0.63}
    },
    {
      "id": "ffn.0", "gradient_norm": 0.033, "alpha": 1.12, "gamma": 0.53, "k_star": 0.25,
      "domain_tags": {"general": 1.0, "bio": 0.68, "legal": 0.50}
    },
    {
      "id": "attn.1", "gradient_norm": 0.045, "alpha": 1.50, "gamma": 0.60, "k_star": 0.13,
      "domain_tags": {"general": 1.0, "bio": 0.75, "legal": 0.80}
    }
  ]
}"""

sizes = st.floats(0, 1e140)
shares = st.floats(0, 1, exclude_min=True)
texts = st.text(max_size=8)
labels = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"], exclude_characters="/\\"), max_size=8)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
unknown_keys = st.dictionaries(
    texts.map("x-".__add__) | st.sampled_from(["extra", "name", "metadata"]), plain, max_size=2
)
counts = st.none() | st.integers(0, 200)
places = st.tuples(counts, st.none() | st.just("ä.1")) | st.sampled_from(
    [(0, "attn.0"), (3, "ffn.3"), (None, "ffn.3"), (7, None)]
)
entries = st.builds(
    lambda place, spread, **known: Submodule(
        depth=place[0],
        group=place[1],
        norm_interval=None
        if spread is None
        else (known["gradient_norm"] * (1 - spread), known["gradient_norm"] * (1 + spread)),
        **known,
    ),
    place=places,
    spread=st.none() | st.floats(0, 1),
    name=labels.map("a".__add__),
    gradient_norm=sizes,
    kind=st.none() | labels.map("k".__add__),
    shape=st.none() | st.lists(st.integers(1, 9), min_size=3, max_size=4).map(tuple),
    form=st.sampled_from(get_args(Form)),
    quantized=st.booleans(),
    **dict.fromkeys(
        ("median_norm", "signal_norm", "noise_scale", "weight_norm", "adam_gain", "gate_weight"), st.none() | sizes
    ),
    **dict.fromkeys(("alpha_error", "weight_gradient", "influence", "influence_mismatch"), st.none() | sizes),
    **dict.fromkeys(("alpha", "gamma", "k_star"), st.none() | shares),
    **dict.fromkeys(
        ("prompt_share", "prompt_adam_share", "singular_energy", "token_share"), st.none() | st.floats(0, 1)
    ),
    alignment=st.none() | st.lists(st.floats(-1e140, 1e140), min_size=1, max_size=16).map(tuple),
    examples=counts,
    domain_tags=st.dictionaries(labels, sizes, max_size=2),
    extra=unknown_keys,
)
objects = st.dictionaries(texts, plain, max_size=2)
blueprints = st.builds(
    Blueprint,
    model_id=labels,
    submodules=st.lists(entries, min_size=1, max_size=4, unique_by=lambda e: e.name).map(tuple),
    training_checkpoint=st.sampled_from([0.5, 1.0, 1 / 3]),
    level=st.sampled_from(["submodule", "group", "layer"]),
    model_revision=st.none() | labels,
    model_digest=st.none() | labels,
    concentration=objects,
    influence=objects,
    costs=objects,
    provenance=objects,
    extra=unknown_keys,
)

keys = st.sampled_from(
    "model_id layers id gradient_norm schema_version level alpha gamma domain_tags norm_interval shape depth "
    "training_checkpoint provenance quantized extra x".split()
)
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, 1e308, "attn.0", "a", "submodule", 1, 0.5]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=6),
    max_leaves=20,
)
