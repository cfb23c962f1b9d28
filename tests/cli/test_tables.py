"""The tables of `show` and `targets`, and the defaults that the help names. Run: pytest tests/cli/test_tables.py"""

import json
import re
from dataclasses import replace

import pytest
import yaml
from peft import LoraConfig

from peft_blueprint import plan_placement
from peft_blueprint.blueprint import NUMBERS, best_share
from peft_blueprint.cli.output import Output
from peft_blueprint.errors import BlueprintError
from peft_blueprint.place import PlacementOptions


@pytest.fixture
def tagged(two_layers, tmp_path):
    """A blueprint with every statistic, and everything else that the paper's format has, as a file."""
    tags = {"law": 1.0, "bio": 0.5, "math": 2.0, "code": 1.5, "[b]x": 1.0}
    entries = []
    for i, entry in enumerate(two_layers):
        missing = {name: 0.5 / (1 + i) for name in NUMBERS if getattr(entry, name) is None}
        tags["[b]x"] = 1 / (1 + i)
        entries.append(replace(entry, domain_tags=dict(tags), extra={"ours": 3 * i}, **missing))
    return replace(two_layers, submodules=tuple(entries), training_checkpoint=0.8).save(tmp_path / "tagged.json")


def columns(out):
    """The headings of a table, and its first row by them."""
    head, row = (next(line for line in out.splitlines() if line.startswith(edge)) for edge in "┃│")
    names = [cell.strip() for cell in head.strip("┃").split("┃")]
    return dict(zip(names, (cell.strip() for cell in row.strip("│").split("│")), strict=True))


def test_show_has_all_of_the_papers_format(run, tagged, two_layers):
    """Alpha, gamma, k*, tags and the checkpoint; a number in its column."""
    status, out, _ = run("show", tagged)
    found, best = columns(out), max(two_layers, key=lambda entry: entry.gradient_norm)
    assert status == 0 and "training_checkpoint 0.8" in out
    assert {name: found[name] for name in ("id", "kind", "alpha", "gamma", "k_star")} == {
        "id": best.name,
        "kind": best.kind,
        **{name: f"{getattr(best, name):.4g}" for name in ("alpha", "gamma", "k_star")},
    }
    assert found["domain_tags"] == "law 1, bio 0.5, math 2, code 1.5 and 1 more"


def test_show_of_a_mixture_of_domains(run, tagged):
    """The norm over the domains' weights; an unknown domain is named."""
    _, out, _ = run("show", tagged, "--domain", "math=1,bio=1", "--format", "json")
    first = json.loads(run("show", tagged, "--format", "json")[1])["layers"]
    mixed = {entry["id"]: entry["gradient_norm"] for entry in json.loads(out)["layers"]}
    assert mixed == pytest.approx({entry["id"]: 1.25 * entry["gradient_norm"] for entry in first})
    status, _, error = run("show", tagged, "--domain", "laws")
    assert status and "no domain tag 'laws'" in error


def test_show_has_k_star_of_the_whole_model(run, two_layers, tmp_path):
    """By parameters and by submodules, as the file has it; a file without it says nothing."""
    costs = best_share(two_layers).to_costs()
    assert costs.keys() <= two_layers.costs.keys(), "which the measurement writes"
    _, out, _ = run("show", replace(two_layers, costs=costs).save(tmp_path / "b.json"))
    said = f"k* {100 * costs['k_star']:.3g} % of parameters ({100 * costs['k_star_submodules']:.3g} % of submodules, "
    assert f"{said}{costs['k_star_ratio']:.2f} times the gain per cost of all)" in out
    for other, expected in (({}, False), ({"k_star": 0.15}, True), ({"k_star": "a"}, False)):
        _, out, _ = run("show", replace(two_layers, costs=other).save(tmp_path / "b.json"))
        assert ("k* 15 % of parameters" in out) == expected and ("k* " in out) == expected


@pytest.mark.parametrize("by", [*NUMBERS, "norm_error", "domain_tags.[b]x", "ours"])
def test_show_has_the_column_that_it_sorts_by(by, run, tagged):
    """For any statistic; it falls from row to row."""
    status, out, _ = run("show", tagged, "--by", by, "--top", 0)
    assert status == 0
    heading = next(line for line in out.splitlines() if line.startswith("┃"))
    place = [cell.strip() for cell in heading.strip("┃").split("┃")].index(by)
    values = [float(line.strip("│").split("│")[place]) for line in out.splitlines() if line.startswith("│")]
    assert len(values) == 14 and values == sorted(values, reverse=True)


def test_entries_without_the_statistic_come_last(run, two_layers, tmp_path):
    """As those whose noise is larger than their signal; the others are sorted by it."""
    entries = [replace(e, noise_scale=None if i % 3 else 1.0 + i) for i, e in enumerate(two_layers)]
    file = replace(two_layers, submodules=tuple(entries)).save(tmp_path / "b.json")
    names = run("show", file, "--by", "noise_scale", "--top", 0, "--format", "quiet")[1].split()
    have = [e.name for e in entries if e.noise_scale is not None]
    assert names == have[::-1] + [e.name for e in entries if e.noise_scale is None]


def test_a_statistic_without_values_has_no_column(run, two_layers, tmp_path):
    """As in a file of the paper's own format."""
    entries = tuple(replace(e, alpha=None, gamma=None, signal_norm=None, norm_interval=None) for e in two_layers)
    out = run("show", replace(two_layers, submodules=entries).save(tmp_path / "b.json"))[1]
    assert not {"alpha", "gamma", "signal_norm", "95 %", "domain_tags"} & columns(out).keys()
    assert "k_star" in columns(out) and "training_checkpoint 1," in out


@pytest.mark.parametrize("by", ["gradient_norm", "signal_norm"])
def test_a_narrow_terminal_leaves_out_the_least_important_columns(by, run, tagged, monkeypatch, capsys):
    """And says so; the papers' columns and the one that it sorts by stay."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, out, err = run("show", tagged, "--by", by)
    lines = re.sub(r"\x1b\[\d*m", "", out).splitlines()
    heading = "".join(line for line in lines if "┃" in line)
    assert max(map(len, lines[1:])) <= 80 and "too narrow for" in err
    assert all(name in heading for name in ("id", "alpha", "gamma", "k_star", by[:5])) and "adam" not in heading


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        ((), None),
        (("--ranks", "uniform", "--num-modules", 3), 16),
        (("--num-modules", 3, "--rank", 4), 4),
        (("--coverage", "none", "--fraction", 0.2), None),
        (("--mode", "lora+unfreeze", "--num-modules", 3), 16),
        (("--budget", "9 modules"), None),
        (("--ranks", "score", "--num-modules", 3), None),
    ],
)
def test_targets_shows_the_rank_that_it_chose(words, rank, run, tagged):
    """Of every adapter, as the configuration printed for PEFT has it."""
    status, out, _ = run("targets", tagged, *words)
    shown = columns(out)
    config = {}
    exec(run("targets", tagged, *words, "--for", "peft")[1].rpartition("model = ")[0], config)
    config = next(value for value in config.values() if isinstance(value, LoraConfig))
    assert status == 0 and int(shown["rank"]) == config.rank_pattern.get(shown["id"], config.r)
    assert rank is None or int(shown["rank"]) == rank
    assert config.lora_alpha == 2 * config.r


def test_alpha_is_that_of_all_linear_lora(run, tagged):
    """At --rank; the adapters, whose rank is raised, keep alpha over rank, and --for and the comment agree on it."""
    words = ("--ranks", "equal_parameters", "--rank", 4, "--num-modules", 3, "--alpha", 4, "--for", "axolotl")
    text = run("targets", tagged, *words)[1]
    config = yaml.safe_load(text)
    assert config["lora_r"] == config["lora_alpha"] > 4 and f"3 adapters of rank {config['lora_r']} of" in text


def defaults(blueprint, **options):
    """What a placement says of the choices that were left to it."""
    placement = plan_placement(blueprint, **options)
    ranks = {*placement.ranks.values(), placement.rank or 16}
    return placement.rank_by, dict(placement.selector), max(ranks)


def test_the_help_names_the_defaults_that_are_the_defaults(run, two_layers, monkeypatch):
    """Of the options whose default depends on others."""
    monkeypatch.setenv("COLUMNS", "300")
    shown = " ".join(run("targets", "--help")[1].replace("│", " ").split())
    for said in (
        "1/7 with the defaults of rank_by and ranks, otherwise keep=0.95; 0.2 for blocks, for another coverage and",
        "Default: cover_gain for adapters, adam_gain for other choices, and gradient_norm",
        "Default: equal_parameters in mode lora if shapes are known and neither r nor a budget of parameters",
        "Default: 16, or 8, 4, 2, 1 if a budget of parameters",
        "Default: 1.",
    ):
        assert said in shown
    by, selector, rank = defaults(two_layers)
    assert (by, selector) == ("cover_gain", {"fraction": 1 / 7}) and rank > 16
    assert defaults(two_layers, r=8) == ("cover_gain", {"keep": 0.95}, 8)
    assert defaults(two_layers, rank_by="adam_gain")[:2] == ("adam_gain", {"keep": 0.95})
    assert defaults(two_layers, coverage="none")[:2] == ("adam_gain", {"fraction": 0.2})
    assert defaults(two_layers, mode="unfreeze")[:2] == ("adam_gain", {"fraction": 0.2})
    assert defaults(two_layers, mode="lora+unfreeze", num_modules=2)[2] == 16
    without_gain = tuple(replace(e, adam_gain=None) for e in two_layers)
    assert defaults(replace(two_layers, submodules=without_gain), num_modules=2)[0] == "gradient_norm"
    without_shape = tuple(replace(e, shape=None) for e in two_layers)
    assert defaults(replace(two_layers, submodules=without_shape))[1:] == ({"fraction": 0.2}, 16)
    assert len(plan_placement(two_layers, mode="lora+unfreeze", num_modules=2).unfreeze) == 1
    assert PlacementOptions().coverage == "kind+depth" and PlacementOptions().mode == "lora"


def test_the_answer_of_generate_and_fetch_is_the_same_table(two_layers, capsys):
    """One function prints all of them; a statistic that no entry has is refused."""
    Output().blueprint(two_layers, "k_star", 3, bare=[])
    assert "the 3 largest by k_star" in capsys.readouterr().out
    with pytest.raises(
        BlueprintError, match="by must be one of .*gamma, norm_error, which .* has, got 'domain_tags.law'"
    ):
        Output().blueprint(two_layers, "domain_tags.law", 3, bare=[])
    Output("json").blueprint(two_layers, "alpha", 3, bare=[])
    assert json.loads(capsys.readouterr().out)["layers"][0]["k_star"] == two_layers.submodules[0].k_star
