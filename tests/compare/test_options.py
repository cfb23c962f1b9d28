"""Options of the probe: checked in one line, read from text, and the domain's blueprint found wherever it stands."""

from dataclasses import replace

import pytest

from peft_blueprint import Blueprint, BlueprintError, Submodule
from peft_blueprint.compare import ProbeOptions, read_for_domain
from peft_blueprint.errors import FormatError, MismatchError
from tests.hub.loopback import LoopbackHub


PUBLISHED = Blueprint("org/m", (Submodule("attn.0", 2.0, domain_tags={"law": 1.0, "bio": 0.25}),), level="group")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blend_weight": 1.5}, r"blend_weight must be in \[0, 1\], got 1.5"),
        ({"blend_weight": "half"}, r"blend_weight must be a number, got 'half'"),
        ({"probe_examples": -1}, "probe_examples must be at least 0, got -1"),
        ({"drift_policy": "ignore"}, "drift_policy must be warn, error, refresh or coarsen, got 'ignore'"),
        ({"drift_threshold": 2}, r"drift_threshold must be in \[-1, 1\], got 2"),
        ({"by_uncertainty": 1}, "by_uncertainty must be true or false, got 1"),
        ({"domain": "bio=,law=1"}, "domain must be a tag, or weights of different tags"),
        ({"domain": "bio=1,bio=1"}, "domain must be a tag, or weights of different tags"),
        ({"domain": "bio=1,law"}, "domain must be a tag, or weights of different tags"),
        ({"domain": "bio=-1"}, "The weight of domain 'bio' must be a positive number, got -1.0"),
        ({"domain": {}}, "domain must be a tag"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    """With the option, the expected and the given value."""
    with pytest.raises(BlueprintError, match=message):
        ProbeOptions(**options)


def test_a_domain_is_read_from_its_own_file_or_from_the_tags(tmp_path):
    """A domain's file has all its statistics; mixtures and other names use the tags."""
    PUBLISHED.save(tmp_path / "blueprint.json")
    replace(PUBLISHED, submodules=(Submodule("attn.0", 7.0),)).save(tmp_path / "blueprint-law.json")

    def norm(domain, source=tmp_path):
        return read_for_domain(source, ProbeOptions(domain=domain).domain).submodules[0].gradient_norm

    assert norm(None) == 2.0 and norm("law") == 7.0 and norm("bio") == 0.5
    assert norm("law", tmp_path / "blueprint.json") == 2.0, "a file stands for itself"
    assert norm("law=1,bio=1") == norm({"law": 2, "bio": 2}) == pytest.approx(1.25)
    with pytest.raises(MismatchError, match=r"no domain tag 'Code'; the blueprint's tags are \['bio', 'law'\]"):
        norm("Code")
    (tmp_path / "blueprint-bio.json").write_text("{")
    with pytest.raises(FormatError, match=r"blueprint-bio\.json"):
        norm("bio")


def test_a_domain_is_read_from_a_repository_too(tmp_path, plain_client):
    """A file of its own where the repository has one, and otherwise the tag, which takes a second request."""
    PUBLISHED.save(tmp_path / "blueprint.json")
    replace(PUBLISHED, submodules=(Submodule("attn.0", 7.0),)).save(tmp_path / "blueprint-law.json")
    with LoopbackHub({"org/m": tmp_path}) as hub:
        there = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
        for domain, norm in (("law", 7.0), ("bio", 0.5), ("law=1,bio=1", 1.25)):
            assert read_for_domain("org/m", domain, **there).submodules[0].gradient_norm == norm
        with pytest.raises(MismatchError, match="no domain tag 'code'"):
            read_for_domain("org/m", "code", **there)
