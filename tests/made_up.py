"""Made-up blueprints."""

from peft_blueprint import Blueprint, Submodule


def measured(norms, *, data="a", examples=8, model_id="org/m", checkpoint=0.8, domain="law", error=0.1, **more):
    """A blueprint of made-up norms, by name, over made-up data; more keys are the provenance's."""
    entries = tuple(
        Submodule(
            name,
            float(norm),
            kind=name.rpartition(".")[2],
            depth=int(name.split(".")[0]),
            norm_interval=(norm * (1 - error), norm * (1 + error)),
            examples=examples,
        )
        for name, norm in norms.items()
    )
    provenance = {"domains": {domain: {"examples": examples, "data_digest": f"sha256:{data}"}}, **more}
    return Blueprint(model_id, entries, training_checkpoint=checkpoint, provenance=provenance)


UP = {f"{depth}.{kind}": depth + 1.0 + 10 * (kind == "up") for depth in range(6) for kind in ("q", "up")}


def norms_of(blueprint):
    return [entry.gradient_norm for entry in blueprint]
