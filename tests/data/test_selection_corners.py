"""Edge cases of choosing examples: odd data, bad options, kills at bad moments. Run: pytest tests/data/test_selection_corners.py"""

import time

import numpy as np
import pytest

from peft_blueprint.data import select
from peft_blueprint.data.examples import Pool
from peft_blueprint.data.options import SelectionOptions
from peft_blueprint.data.resume import Progress, TopK
from peft_blueprint.data.scan import Scan
from peft_blueprint.data.scoring import ExampleScorer
from peft_blueprint.data.select import select_examples
from peft_blueprint.data.text_similarity import NearDuplicates
from peft_blueprint.errors import BlueprintError, MismatchError
from tests.choosing import choose, make_rows, model


POOL = make_rows(40)
BARE = {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}
SMALL = {"count": 5, "method": "predicted_norm", "small": 20}


class Killed(BaseException):
    """Stands in for a signal."""


@pytest.mark.parametrize("form", [list, iter])
def test_no_more_examples_than_to_measure_are_all_measured(form):
    """With 20 usable examples and small=20 none is predicted; with 21 some are."""
    rows = [BARE, *POOL[:10], BARE, *POOL[10:20], BARE]
    found = choose(form(rows), **SMALL)
    assert found.scores == pytest.approx(choose(rows, count=5, method="norm").scores, rel=1e-3)
    assert "predictor" not in found.report and found.report["without_targets"] == 3
    assert ["only 20 examples have a target" in said for said in found.fallbacks] == [True]
    assert "predictor" in choose(form([BARE, *POOL[:21]]), **SMALL).report


@pytest.mark.parametrize("kept", [False, True])
def test_a_stream_is_read_ahead_until_enough_examples_have_targets(tmp_path, kept):
    """Over a thousand examples without a target are not held in memory, and a resumed run skips them too."""
    rows = [BARE] * 1000 + [*POOL[:8], *[BARE] * 50, *POOL[8:]] + [BARE] * 7
    options = {**SMALL, "keep_state": tmp_path / "state" if kept else None}
    found = choose(iter(rows), **options)
    report = found.report
    assert report["predictor"]["measured"] == 20 and report["without_targets"] == 1057 and report["examples"] == 1097
    assert "drawn from the stream's first 1071" in found.fallbacks[0]
    assert [rows[i] for i in found.indices] == list(found.rows)
    again = choose(iter(rows), **options)
    assert (again.indices, again.fallbacks, again.report["usable"]) == (found.indices, found.fallbacks, 40)
    scorer = ExampleScorer(model(), None, 4, 0, 0, None)
    scan = Scan(Pool(iter(rows)), scorer, Progress(), SelectionOptions(small=20))
    scan._read_ahead()
    assert len(list(zip(scan._ahead, range(30), strict=False))) == 30 and scan._skipped
    with pytest.raises(BlueprintError, match="None of 1100 examples has a target"):
        choose(iter([BARE] * 1100), **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 2.5}, r"count must be an integer, got 2.5 \(float\)"),
        ({"count": float("nan")}, r"count must be an integer, got nan \(float\)"),
        ({"count": True}, r"count must be an integer, got True \(bool\)"),
        ({"count": "3"}, r"count must be an integer, got '3' \(str\)"),
        ({"fraction": "0.3"}, "fraction must be a number in .0, 1., got '0.3'"),
        ({"fraction": True}, "fraction must be a number in .0, 1., got True"),
        ({"count": 1, "batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"count": 1, "seed": -1}, "seed must be at least 0, got -1"),
        ({"count": 1, "submodules": ["x"]}, "method='random' measures no gradients"),
        ({"count": 1, "method": "bm25", "target": []}, "The target set is empty. Give target="),
        ({"count": 1, "method": "alignment", "target": iter([])}, "The target set is empty. Give target="),
    ],
)
def test_bad_options_are_refused(options, message):
    """The error names the option and the value."""
    with pytest.raises(BlueprintError, match=message):
        choose(POOL, **options)


def test_numpy_numbers_are_accepted(tmp_path):
    """As counts and fractions, also with kept state."""
    path = tmp_path / "state"
    assert len(choose(POOL, count=np.int64(3), keep_state=path)) == len(choose(POOL, count=3, keep_state=path)) == 3
    assert len(choose(POOL, fraction=np.float32(0.5), keep_state=tmp_path / "other")) == 20


def test_too_many_for_facility_location_are_refused_at_once(monkeypatch):
    """Before anything is measured."""
    monkeypatch.setattr(select, "MAX_FACILITY_POINTS", 39)
    monkeypatch.setattr(ExampleScorer, "distribute", None)
    with pytest.raises(BlueprintError, match="takes at most 39 examples, got 40. Sample some first"):
        choose(POOL, count=2, method="coreset_facility")


def test_state_that_cannot_be_kept_is_refused_at_once(tmp_path, monkeypatch):
    """Before anything is measured."""
    monkeypatch.setattr(ExampleScorer, "distribute", None)
    (tmp_path / "file").touch()
    with pytest.raises(BlueprintError, match=r"The state cannot be kept in .*file/state.* Choose another folder"):
        choose(POOL, count=2, method="norm", keep_state=tmp_path / "file" / "state")


def alike():
    """An example of 66 tokens, another of 65, and the first with six more: its near-duplicate."""
    long, other = list(range(1, 67)), [1 + 7 * i % 90 for i in range(65)]
    return [{"input_ids": ids, "labels": ids} for ids in (long, other, [*long, *range(67, 73)])]


def test_a_better_near_duplicate_replaces_the_kept_one():
    """In a stream as in a list; a replaced example no longer blocks others."""
    rows = alike()
    for count, wanted in ((1, (2,)), (2, (1, 2))):
        for form in (list, iter):
            found = choose(form(rows), count=count, method="length")
            assert found.indices == wanted, (count, form)
    generator = np.random.default_rng(0)
    kinds = [generator.integers(1, 97, 60).tolist() for _ in range(12)]
    many = [{"input_ids": ids, "labels": ids} for i in range(90) if (ids := [*kinds[i * 7 % 12], *range(i * 5 % 7)])]
    short = [{"input_ids": [i % 5, *[0] * (i % 3)], "labels": [i % 5, *[0] * (i % 3)]} for i in range(40)]
    for count in (3, 8, 12, 20):
        for rows in (many, short, many + short):
            for method in ("length", "length_short", "random"):
                found = [choose(form(rows), count=count, method=method).indices for form in (list, iter)]
                assert found[0] == found[1], (count, method)


def test_a_removed_text_is_new_again():
    """In NearDuplicates and TopK, also after loading a state."""
    guard, texts = NearDuplicates(), ["one two three four five six", "seven"]
    for key, text in zip((5, 9), texts, strict=True):
        guard.add(guard.fingerprint(text), key)
    guard = NearDuplicates.from_state(guard.state())
    assert [guard.find_similar(guard.fingerprint(text)) for text in texts] == [[5], [9]]
    guard.remove(9)
    guard.remove(5)
    assert len(guard) == 0 and guard.is_new(texts[0]) and guard.is_new(texts[1])
    best = TopK(2)
    for score, index in ((3, 0), (1, 1)):
        best.offer(score, index)
    assert best.next_out == 1 and best.score_of(0) == 3
    best.remove(0)
    assert [index for index, _, _ in best.ranked()] == [1] and best.next_out is None and best.would_keep(0, 7)


def killed_after(monkeypatch, calls, rows, options):
    """Kill a run after this many chunks."""
    distribute, seen = ExampleScorer.distribute, []

    def dying(*arguments):
        seen.append(0)
        if len(seen) > calls:
            raise Killed
        return distribute(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ExampleScorer, "distribute", dying)
        with pytest.raises(Killed):
            choose(rows, **options)


@pytest.mark.parametrize("form", [list, iter])
def test_other_data_is_refused_after_the_subset_was_measured(tmp_path, monkeypatch, form):
    """Even before the first position is saved; the state stays and serves its own data."""
    options = {**SMALL, "batch_size": 1, "keep_state": tmp_path / "state", "state_every": 8}
    killed_after(monkeypatch, 6, form(POOL), options)  # three chunks of the subset, measured and then featurized
    content = options["keep_state"].read_bytes()
    for other in (make_rows(40, seed=1), POOL[::-1], POOL[1:] + POOL[:1]):
        with pytest.raises(MismatchError, match="The 20 examples that were measured are not those of the kept state"):
            choose(form(other), **options)
    if form is iter:
        with pytest.raises(MismatchError, match="of them are missing"):
            choose(iter(POOL[:9]), **options)
    assert options["keep_state"].read_bytes() == content
    whole = choose(form(POOL), **options | {"keep_state": None})
    assert choose(form(POOL), **options).indices == whole.indices


def test_the_seconds_of_a_killed_run_count(tmp_path, monkeypatch):
    """They are stored in the state and added to the resumed run's report."""
    options = {"count": 5, "method": "norm", "batch_size": 1, "keep_state": tmp_path / "state", "state_every": 8}
    distribute = ExampleScorer.distribute

    def slow(*arguments):
        time.sleep(0.4)
        return distribute(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ExampleScorer, "distribute", slow)
        killed_after(patched, 4, POOL, options)
    start = time.perf_counter()
    seconds = choose(POOL, **options).report["cost"]["seconds"]
    assert seconds > 1.2 + 0.5 * (time.perf_counter() - start)


@pytest.mark.parametrize("form", [list, iter])
def test_fallbacks_are_reported_once(tmp_path, form):
    """However often the run is resumed."""
    rows = [
        {"input_ids": (ids := np.random.default_rng(i).integers(1, 97, 12).tolist()), "labels": ids} for i in range(60)
    ]
    options = {**SMALL, "small": 16, "features": "tokens", "keep_state": tmp_path / "state", "seed": 1}
    said = [choose(form(rows), **options).fallbacks for _ in range(3)]
    assert any("no better than chance" in one for one in said[0])
    assert said[0] == said[1] == said[2] and len(set(said[0])) == len(said[0])
    few = [choose(form(rows[:12]), **options | {"keep_state": tmp_path / "few"}).fallbacks for _ in range(3)]
    assert few[0] == few[1] == few[2] and len(few[0]) == 1


def test_bm25_reports_that_no_word_is_shared():
    """The first examples are chosen then."""
    rows, target = make_rows(6, low=1, high=40), make_rows(2, low=50, high=90)
    found = select_examples(None, rows, count=2, method="bm25", target=target, progress=False)
    assert found.indices == (0, 1) and "no example shares a word with the target" in found.fallbacks[0]
    assert not select_examples(None, rows, count=2, method="bm25", target=rows[:1], progress=False).fallbacks
