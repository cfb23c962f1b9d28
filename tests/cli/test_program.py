"""The command line as a person meets it: verbs, JSON, exit status, messages. Run: pytest tests/test_cli.py"""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from peft import LoraConfig, get_peft_model

import peft_blueprint
from peft_blueprint import Blueprint, generate_blueprint, plan_placement
from peft_blueprint.blueprint import bundled_blueprints
from peft_blueprint.testing import save_tiny_model, tiny_llama, tiny_mixtral, toy_batches


@pytest.fixture
def file(blueprint, tmp_path):
    """The session's blueprint as a file."""
    return blueprint.save(tmp_path / "published.json")


def test_show_prints_the_strongest_and_all_of_it_as_json(run, file, blueprint):
    """The table has the strongest on top; --json is the whole record; --quiet is bare names."""
    strongest = max(blueprint, key=lambda e: e.gradient_norm).name
    status, out, err = run("show", file, "--top", 3)
    assert status == 0 and out.index(strongest) and out.count("model.layers") == 3 and not err
    gini = blueprint.concentration["tail_within_kinds"]["gini"]
    assert f"Gini {gini['value']:.2f} [{gini['low']:.2f}, {gini['high']:.2f}], tail: " in out
    assert json.loads(run("show", file, "--format", "json")[1])["layers"][0]["id"] == blueprint.names[0]
    assert run("show", file, "--format", "quiet", "--top", 2)[1].splitlines()[0] == strongest


def test_targets_prints_the_placement(run, file, blueprint):
    """Names are those of plan_placement; JSON gives lora and unfreeze."""
    expected = plan_placement(blueprint, fraction=0.1, rank_by="gradient_norm", coverage="kind")
    words = ("targets", file, "--fraction", 0.1, "--rank-by", "gradient_norm", "--coverage", "kind")
    assert run(*words, "--format", "quiet")[1].split() == list(expected.lora)
    assert json.loads(run(*words, "--format", "json")[1])["lora"] == list(expected.lora)
    assert "8 adapters" in run(*words)[1]
    assert json.loads(run("targets", file, "--mode", "unfreeze", "--num-modules", 2, "--format", "json")[1])[
        "unfreeze"
    ]


def test_targets_prints_each_trainers_configuration(run, file, blueprint):
    """--for prints that configuration alone, with the rank and alpha asked for; --json puts it in an object."""
    expected = plan_placement(blueprint, fraction=0.1)
    status, out, err = run("targets", file, "--fraction", 0.1, "--for", "axolotl", "--rank", 4, "--alpha", 12)
    config = yaml.safe_load(out)
    assert status == 0 and not err
    assert (config["lora_r"], config["lora_alpha"], config["lora_target_modules"]) == (4, 12, sorted(expected.lora))
    words = ("targets", file, "--fraction", 0.1, "--for", "llamafactory")
    config = yaml.safe_load(run(*words, "--rank", 4)[1])
    assert (config["lora_rank"], config["lora_alpha"]) == (4, 8)
    words = (*words, "--rank", 4)
    answer = json.loads(run(*words, "--format", "json")[1])
    assert answer["trainer"] == "llamafactory" and answer["config"] == run(*words, "--format", "quiet")[1]


def test_export_writes_an_adapter_of_one_rank(run, tmp_path):
    """From a folder to another; the rank can be given; a folder without an adapter is bad use."""
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 5})
    get_peft_model(tiny_llama(layers=2), config).save_pretrained(tmp_path / "many")
    status, out, _ = run("export", tmp_path / "many", tmp_path / "one", "--format", "quiet")
    assert status == 0 and out.strip() == str(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["r"] == 5
    assert json.loads(run("export", tmp_path / "many", tmp_path / "one", "--rank", 8, "--format", "json")[1])[
        "written"
    ]
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["r"] == 8
    status, _, err = run("export", tmp_path, tmp_path / "two")
    assert status == 2 and "holds no adapter" in err


def test_targets_says_which_names_are_parameters(run, tmp_path):
    """Fused experts go to `target_parameters`, and the table says so."""
    model = tiny_mixtral(layers=2)
    blueprint = generate_blueprint(model, toy_batches(), bootstrap=10, progress=False)
    fused = [entry.name for entry in blueprint if entry.form == "experts"]
    file = blueprint.save(tmp_path / "mixture.json")
    placement = json.loads(run("targets", file, "--fraction", 1, "--format", "json")[1])
    assert placement["target_parameters"] == fused
    assert run("targets", file, "--fraction", 1)[1].count("adapter on a parameter") == len(fused)


def test_pictures_are_drawn(run, file, tmp_path):
    """show and targets write a PNG."""
    run("show", file, "--picture", tmp_path / "a.png")
    run("targets", file, "--picture", tmp_path / "b" / "c.png")
    for picture in (tmp_path / "a.png", tmp_path / "b" / "c.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    status, _, err = run("show", file, "--picture", tmp_path / "a.nonsense")
    assert status == 2 and "cannot be written" in err


def test_compare_sorts_by_change_of_rank(run, file, blueprint, tmp_path):
    """The entry whose rank changed most leads; another model's blueprint is refused."""
    record = json.loads(file.read_text())
    del record["digest"]  # it is changed on purpose
    record["layers"][70] |= {"gradient_norm": 1e6, "norm_interval": [1e6, 1e6]}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(record))
    status, out, _ = run("compare", file, other, "--format", "json")
    assert status == 0 and json.loads(out)[0]["rank_first"] - json.loads(out)[0]["rank_second"] >= 9
    del record["layers"][3]
    other.write_text(json.dumps(record))
    status, _, err = run("compare", file, other)
    assert status == 2 and blueprint.names[3] in err


def test_drift_answers_with_its_exit_status(run, file, tmp_path):
    """0 when the two agree, 1 when they do not, 2 when there is nothing to compare."""
    record = json.loads(file.read_text())
    del record["digest"]  # it is changed on purpose
    status, out, _ = run("drift", file, file, "--format", "json")
    assert status == 0 and json.loads(out)["correlation"] > 0.999
    for depth, entry in enumerate(record["layers"]):
        entry |= {"gradient_norm": 1.0 + depth, "norm_interval": [1.0 + depth, 1.0 + depth]}
    (tmp_path / "reversed.json").write_text(json.dumps(record))
    assert run("drift", tmp_path / "reversed.json", file)[0] == 1
    assert run("drift", file, file, "--threshold", 1.5)[0] == 1
    assert run("drift", file, tmp_path / "none.json")[0] == 2


def test_generate_measures_a_model_folder_on_a_file(run, tmp_path):
    """From a model on disk and JSON lines to a blueprint whose provenance has the command."""
    folder = save_tiny_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": "1 2 3", "answer": f"{i} 5 6"}) + "\n" for i in range(9)))
    out = tmp_path / "out.csv"
    words = ("generate", folder, "--out", out, "--columns", "prompt=question,completion=answer", "--max-examples", 6)
    status, printed, _ = run(*words, "--data", data, "--format", "quiet")
    assert status == 0 and printed.strip() == str(out)
    record = Blueprint.from_pretrained(out)
    assert record.model_id == str(folder) and record.provenance["domains"]["data"]["examples"] == 6
    assert record.provenance["command"].startswith("peft-blueprint generate ")
    run(*words, "--data", data, "--method", "sketch", "--sketch-size", 8, "--include", "all", "--format", "quiet")
    record = Blueprint.from_pretrained(out)
    assert (record.provenance["method"], record.provenance["sketch_size"]) == ("sketch", 8)
    assert {"embedding", "norm", "linear"} <= {entry.form for entry in record}
    run(*words, "--data", f"first={data}", "--data", f"second={data}", "--format", "quiet")
    assert Blueprint.from_pretrained(out).submodules[0].domain_tags == {"first": 1.0, "second": 1.0}


def test_generate_publishes_with_privacy_and_binds_to_weights(run, tmp_path):
    """--dp-epsilon releases norms alone and says so; --noise guarantees nothing; half a guarantee is refused at once."""
    folder = save_tiny_model(tmp_path / "model")
    data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps({"prompt": "1 2 3", "completion": f"{i} 5 6"}) + "\n" for i in range(40)))
    words = ("generate", folder, "--data", data, "--out", out, "--format", "quiet")
    status, _, err = run(*words, "--dp-epsilon", 50, "--dp-delta", 1e-5, "--digest-weights")
    record = Blueprint.from_pretrained(out)
    assert status == 0, err
    assert record.provenance["privacy"]["epsilon"] == 50 and record.provenance["weights_digest"].startswith("sha256:")
    assert all(entry.adam_gain is None and entry.norm_interval is None for entry in record)
    assert run(*words, "--noise", 0.1)[0] == 0
    assert Blueprint.from_pretrained(out).provenance["privacy"]["noise"] == 0.1
    for wrong, message in (
        (("--dp-epsilon", 1), "needs both"),
        (("--noise", 1, "--dp-epsilon", 1), "one or the other"),
    ):
        status, _, err = run(*words, *wrong)
        assert status == 2 and message in err


def test_generate_shares_the_work_among_processes(tmp_path):
    """Under torchrun two processes write one file, once, of all examples, with the norms that one process finds."""
    folder = save_tiny_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1 2 3", "completion": f"{i} 5 6"}) + "\n" for i in range(9)))
    words = ["generate", str(folder), "--data", str(data), "--max-examples", "5", "--format", "quiet"]
    torchrun = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()
    printed = {}
    for name, launcher in (("one", []), ("two", torchrun)):
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "peft_blueprint.cli", *words, "--out", str(tmp_path / f"{name}.json")],
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed[name] = done.stdout.split()
    assert printed["two"] == [str(tmp_path / "two.json")]
    one, two = (Blueprint.from_pretrained(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert two.provenance["processes"] == 2 and two.provenance["domains"]["data"]["examples"] == 5
    assert [e.gradient_norm for e in two] == pytest.approx([e.gradient_norm for e in one], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "no/such-file.json"], "No blueprint found at no/such-file.json"),
        (["generate", "nowhere", "--data", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (
            ["generate", "nowhere", "--data", "FILE", "--columns", "text=model_id"],
            "The model 'nowhere' cannot be loaded",
        ),
        (["generate", "m", "--data", "x.jsonl", "--out", "FILE/b.json"], "cannot be written: Not a directory"),
        (["generate", "m", "--data", "a.jsonl", "--data", "b.jsonl"], "name every domain"),
        (["targets", "FILE", "--fraction", "2"], "fraction must be in (0, 1], got 2"),
        (["targets", "FILE", "--fraction", "0.1", "--top-p", "0.1"], "both say how many submodules"),
        (["show", "FILE", "--by", "luck"], "by must be one of"),
        (["train", "no.yaml"], "The recipe no.yaml cannot be read"),
        (["frobnicate"], "No such command"),
        (["targets", "FILE", "--coverage", "everything"], "everything"),
        (["targets", "FILE", "--rank-by", "luck"], "luck"),
        (["targets", "FILE", "--mode", "prompt"], "prompt"),
        (["targets", "FILE", "--for", "fairseq"], "Invalid value for '--for': 'fairseq' is not one of 'peft'"),
        (["targets", "FILE", "--alpha", "8"], "choose one, for example --for peft"),
        (["targets", "FILE", "--mode", "unfreeze", "--for", "llamafactory"], "unfreezes blocks only beside LoRA"),
    ],
)
def test_bad_use_is_one_line_and_status_2(run, file, words, message, monkeypatch):
    """No traceback: the error names the thing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, out, err = run(*[word.replace("FILE", str(file)) for word in words])
    assert status == 2 and message in err and "Traceback" not in err and not out


def test_reading_verbs_do_not_wait_for_torch(file):
    """`show` in a fresh process imports neither torch nor peft."""
    script = (
        f"import sys; sys.argv = ['peft-blueprint', 'show', {str(file)!r}, '-q']\n"
        "from peft_blueprint.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_env_prints_versions(run):
    """For a bug report."""
    found = json.loads(run("env", "--format", "json")[1])
    assert found["peft-blueprint"] and found["torch"] and re.match(r"3\.\d+", found["python"])


def test_the_program_tells_its_version_and_completes_its_verbs(run):
    """By --version, and for the shells that Typer knows."""
    assert run("--version")[:2] == (0, f"peft-blueprint {peft_blueprint.__version__}\n")
    assert run("--version") == run("--version", "show")
    out = run("--help")[1]
    assert "--install-completion" in out and "Measure where a model's gradient lives" in out


def test_a_model_is_loaded_as_the_flags_say(run, tmp_path, monkeypatch):
    """Revision, trust, attention and device reach transformers; a device that is not there is named."""
    from peft_blueprint.measure import loading

    seen = []

    def load(name, **settings):
        seen.append(settings)
        raise OSError("enough")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "1", "output": "2"}\n')
    words = ("generate", save_tiny_model(tmp_path / "model"), "--data", rows, "--out", tmp_path / "b.json")
    flags = ("--revision", "v2", "--trust-remote-code", "--attn-implementation", "eager", "--device", "meta")
    assert run(*words, *flags)[0] == 2
    asked = {"revision": "v2", "trust_remote_code": True, "attn_implementation": "eager", "device_map": {"": "meta"}}
    assert seen == [{"dtype": "auto", **asked}]
    status, _, err = run(*words, "--device", "cuda:99")
    assert status == 2 and "device='cuda:99' is not on this machine" in err


def test_a_blueprint_that_comes_with_the_package_is_fetched_by_its_models_id(run, tmp_path):
    """Without a request; the whole table of a model that has some names them."""
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert run("fetch", model, "--domain", "stdlib_docs", "--out", tmp_path / "b.json")[0] == 0
    blueprint = Blueprint.from_pretrained(tmp_path / "b.json")
    assert blueprint.model_id == model and len(blueprint) == 210
    for path in bundled_blueprints(model).values():
        assert Blueprint.from_pretrained(path).digest in (path.parent / "README.md").read_text(encoding="utf-8")
