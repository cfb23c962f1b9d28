"""The page of a report, opened in a real browser where there is one."""

import base64
import re
from dataclasses import replace

import pytest

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.blueprint import to_dict
from peft_blueprint.blueprint.entry import Submodule
from peft_blueprint.publish.page import COLOURS, draw_front, draw_sample, render_page, save_page
from peft_blueprint.runs.quantity import absent, measured
from peft_blueprint.runs.report import make_report
from tests.browser import asked, needs_browser, opened
from tests.made_up_runs import KINDS, made_up_run, placement_of


HOSTILE = '<script>document.title="taken"</script>'

SEEN = """
const shown = element => element.getBoundingClientRect();
const visible = () => [...document.querySelectorAll(".panel")].filter(p => shown(p).height > 0).map(p => p.id);
const first = visible();
const sizes = [], switched = [];
for (const label of document.querySelectorAll(".picker > label")) {
  label.click();
  switched.push([label.htmlFor, visible()]);
  for (const image of document.querySelectorAll("img")) {
    const box = shown(image);
    if (image.checkVisibility()) sizes.push([image.naturalWidth, box.width, box.height]);
  }
}
const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
return {
  first, switched, sizes,
  twice: ids.filter((id, i) => ids.indexOf(id) !== i),
  requests: performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:")),
  scripts: document.querySelectorAll("script").length,
  wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  cells: document.querySelector("#totals").innerText,
  maps: document.querySelectorAll(".map img").length,
  described: [...document.querySelectorAll("img.picture")].every(image => image.alt),
};
"""

ON_A_PHONE = """
const frame = document.createElement("iframe");
frame.style = "width: 360px; height: 700px; border: 0";
frame.srcdoc = "<!doctype html>" + document.documentElement.outerHTML.replace(/<script[^]*?<\\/script>/g, "");
await new Promise(done => { frame.onload = done; document.body.append(frame); });
const inside = frame.contentDocument;
return {
  page: inside.documentElement.scrollWidth,
  tables: Math.max(...[...inside.querySelectorAll("table")].map(table => table.scrollWidth)),
};
"""


def pictures(page):
    """The SVGs in a page, by their descriptions."""
    found = re.findall(r'<img class="picture" src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)">', page)
    return {description: base64.b64decode(svg).decode() for svg, description in found}


@pytest.fixture(scope="module")
def report():
    """Three runs, one with a blueprint, a placement and a decision, one with a hostile name."""
    entries = tuple(
        Submodule(f"model.layers.{d}.{k}", 1.0 + d, kind=k.rpartition(".")[2], depth=d, shape=(8, 8))
        for d in range(6)
        for k in KINDS
    )
    blueprint = Blueprint(model_id="org/m", submodules=entries)
    stopping = {"stopped": True, "step": 600, "reason": "It no longer paid.", "proposal": "Plan 450 steps."}
    chosen = made_up_run("chosen", speed=0.7, seed=1, placement=placement_of(6), blueprint=to_dict(blueprint))
    return make_report(
        [made_up_run("all-linear"), replace(chosen, stopping=stopping), made_up_run(HOSTILE, end=1.5, seed=2)],
        baseline="all-linear",
    )


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    """The file."""
    return save_page(report, tmp_path_factory.mktemp("page") / "page.html")


@needs_browser
def test_opened_in_a_browser_the_page_shows_every_picture_and_asks_for_nothing(page, tmp_path):
    """Starts with the report's resource, the picker shows one panel at a time, and nothing is loaded or executed."""
    dom, said = opened(page, tmp_path, f"--log-net-log={tmp_path / 'net.json'}")
    assert said == []
    assert "<title>3 runs: capability per resource</title>" in dom
    log = (tmp_path / "net.json").read_text(errors="replace")
    assert "page.html" in log
    assert not re.search(
        "file:// +(?:https?|wss?|ftp):", log
    )  # what a page from a file asks for is kept under such a key

    seen = asked(page, tmp_path, SEEN)
    assert seen["first"] == ["panel-seconds"]
    assert [shown for _, shown in seen["switched"]] == [[f"panel-{name[3:]}"] for name, _ in seen["switched"]]
    assert {name for name, _ in seen["switched"]} >= {
        "by-seconds",
        "by-tokens",
        "by-flops",
        "by-energy_joules",
        "by-step",
    }
    assert all(min(sizes) > 0 for sizes in seen["sizes"]) and len(seen["sizes"]) > 20
    assert seen["twice"] == [] and seen["requests"] == [] and not seen["wide"]
    assert seen["described"]
    assert seen["scripts"] == 1  # the question's own
    assert {"measured", "modelled", "absent"} <= set(seen["cells"].split())
    assert seen["maps"] == 1


@needs_browser
def test_on_a_phone_nothing_is_wider_than_the_screen(page, tmp_path):
    """At 360 pixels wide tables and the heat map scroll within themselves; the page does not."""
    found = asked(page, tmp_path, ON_A_PHONE)
    assert found["page"] <= 360 and found["tables"] > 360


def test_the_page_holds_no_address_and_no_script(page):
    """What a record says is text, and no attribute or style names anything elsewhere."""
    page = page.read_text(encoding="utf-8")
    assert "http:" not in page and "https:" not in page and "<script" not in page and "@import" not in page
    assert "&lt;script&gt;" in page
    assert set(re.findall(r'(?:src|href)="([^#"]{1,11})', page)) <= {"data:,", "data:image/"}


def test_the_page_shows_decisions_and_placements(page):
    """The rule's words and proposal, the kinds with their layers and ranks, the baseline's terms."""
    page = page.read_text(encoding="utf-8")
    assert "Stopped at step 600." in page and "Plan 450 steps." in page
    assert "12 adapters" in page and "3–5" in page
    assert re.search(r"12 adapters, ([\d.]+) % of submodules, \1 % of parameters", page)
    assert "relative to <br>baseline" in page and "1.00 ×" in page


def test_a_single_run_has_its_figures_and_no_front():
    """One run is still worth a page: four figures, the training loss too, no comparison; a local model by its name."""
    page = render_page(make_report([made_up_run(model_id="/home/me/models/tuned")]))
    assert 'class="facts"' in page and "training loss" in page and "· tuned<" in page and "/home" not in page
    assert 'id="front"' not in page and "baseline’s" not in page and "one standard error" not in page


def test_a_run_without_evaluation_shows_its_training_loss():
    """The page marks the gain as unknown, and draws the training loss."""
    page = render_page(make_report([replace(made_up_run(), points=())]))
    assert "has no evaluation" in page and 'id="panel-seconds"' in page and "training loss against" in page


def test_a_run_of_nothing_is_a_page_without_pictures():
    """Without evaluations, losses and figures all is marked as absent."""
    bare = replace(made_up_run(), points=(), losses=(), totals={"seconds": absent("no clock")}, about={})
    page = render_page(make_report([bare]))
    assert "No run has an evaluation or a training loss to draw." in page and "no clock" in page


def test_what_is_broken_costs_only_its_own_picture_or_table():
    """The page gives the reason for a missing heat map and makes no request; an invalid placement makes no table."""
    sources = "nowhere/blueprint.json", {"submodules": 3}
    runs = [made_up_run(f"run {i}", blueprint=one, placement=placement_of(6)) for i, one in enumerate(sources)]
    for lora in (5, [{"a": 1}], "q_proj"):
        runs.append(made_up_run(f"broken {lora}", placement={"lora": lora, "unfreeze": 3}))
    page = render_page(make_report(runs))
    assert 'class="map"' not in page and "was not found" in page and "cannot be drawn" in page
    assert "nowhere" not in page and page.count("<summary>By kind</summary>") == len(sources)


def test_dollars_and_foreign_letters_in_names_are_drawn_as_they_are():
    """A metric's name is shown literally; letters that matplotlib's font lacks raise no warning."""
    record = made_up_run("模型 $x$")
    points = tuple(replace(p, metrics={"eval_$\\bad 模": p.metrics["eval_loss"]}) for p in record.points)
    page = render_page(make_report([replace(record, metric="eval_$\\bad 模", points=points)]))
    assert "eval_$\\bad 模 (lower is better)" in pictures(page)["eval_$\\bad 模 against time, min"]


def test_without_matplotlib_the_error_has_the_install_command(monkeypatch):
    """The page needs the plots extra."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(BlueprintError, match=r"peft-blueprint\[plots\]"):
        render_page(make_report([made_up_run()]))


def test_the_same_runs_make_the_same_page(report):
    """Independent of time and chance."""
    assert draw_front(report) == draw_front(report) and render_page(report) == render_page(report)


def test_axes_have_units_and_the_better_direction(report):
    """Time in minutes, FLOPs with a prefix, bytes in GiB; the training loss is drawn too."""
    found = pictures(render_page(report))
    assert "eval_loss (lower is better)" in found["eval_loss against time, min"]
    assert "training loss (lower is better)" in found["training loss against time, min"]
    assert "eval_loss against FLOPs, PFLOP" in found and "optimizer steps" in "".join(found)
    peak = make_report([row.record for row in report.rows], resource="peak_bytes")
    assert draw_front(peak).description.startswith("eval_loss against peak memory, GiB")


def test_no_two_of_many_runs_look_alike():
    """Colours repeat after eight runs, with other dashes and markers."""
    samples = {draw_sample(i).address for i in range(3 * len(COLOURS))}
    assert len(samples) == 3 * len(COLOURS)


def test_parts_of_totals_errors_and_hyperparameters_are_shown():
    """Costs before training and of evaluating, bars of the metric's standard error, and differing settings."""
    probe = {"flops": measured(2e12, "counter").to_dict()}
    run = made_up_run(
        "other",
        probe=probe,
        train_config={"learning_rate": 7e-4},
        seconds_of_which={"evaluating": 30.0, "saving": 0.0},
    )
    last = run.points[-1]
    run = replace(run, points=(*run.points[:-1], replace(last, metrics={**last.metrics, "eval_loss_stderr": 0.04})))
    page = render_page(make_report([run, made_up_run("base")], baseline="base"))
    assert "<small>measuring 2 TFLOP</small>" in page and "<small>evaluating 30 s</small>" in page
    assert "saving" not in page.split('id="totals"')[1] and "± 0.04" in page and "one standard error" in page
    assert re.search(
        r'class="differs"><th class="left">learning_rate</th><td class="wrap">0.0007</td><td class="wrap">–</td>', page
    )
