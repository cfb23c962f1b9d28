"""What a run spent is counted, labelled, and goes on after a resumption. Run: pytest tests/runs/test_ledger.py"""

import json
import socket
import time

import pytest
import torch

from peft_blueprint.errors import BlueprintError, FormatError, MeasurementError
from peft_blueprint.runs import ledger as ledger_module
from peft_blueprint.runs.ledger import Ledger, counted_flops
from peft_blueprint.runs.quantity import RESOURCES, UNITS, Quantity, absent, measured, modelled
from peft_blueprint.testing import tiny_llama


class FakeMeter:
    """A meter with a given reading."""

    name = "a fake meter"

    def __init__(self):
        self.shown = 0.0
        self.broken = False

    def joules(self):
        if self.broken:
            raise MeasurementError("it fell off the wall")
        return self.shown


def test_every_quantity_has_its_label():
    """Uncounted quantities are absent with a reason."""
    with Ledger(meters=[]) as spent:
        pass
    quantities = spent.quantities()
    assert list(quantities) == list(UNITS)
    hows = {name: quantity.how for name, quantity in quantities.items()}
    missing = {"tokens", "flops", "energy_joules", "carbon_grams", "optimizer_bytes"}
    assert hows == {name: "absent" if name in missing else "measured" for name in UNITS}
    assert all(quantity.source for quantity in quantities.values())
    assert spent.totals().keys() == set(UNITS) - missing


def test_time_counts_only_while_it_runs(clock):
    """Pauses are left out; to start or pause twice changes nothing; device-hours are of all devices."""
    spent = Ledger(devices=4, meters=[])
    assert spent.seconds == 0
    clock.now += 5
    spent.start().start()
    clock.now += 10
    assert spent.seconds == 10, "while it runs"
    spent.pause()
    spent.pause()
    clock.now += 100
    with spent:
        clock.now += 26
    assert spent.seconds == 36
    assert spent.quantities()["device_hours"] == measured(36 * 4 / 3600, "clock, 4 devices")


def test_a_failure_inside_stops_the_clock(clock):
    """Costs before an error count."""
    with pytest.raises(KeyError), Ledger(meters=[]) as spent:
        clock.now += 3
        raise KeyError
    clock.now += 3
    assert spent.seconds == 3


def test_tokens_cost_the_given_flops():
    """FLOPs have the label of what a token costs, also if that is known only afterwards."""
    spent = Ledger(meters=[])
    spent.add(100)
    spent.add(tokens=20)
    assert spent.quantities()["tokens"] == measured(120, "counted")
    assert spent.quantities()["flops"] == absent("the cost of a token is not known")
    spent.flops_per_token = modelled(1e6, "CostModel")
    assert spent.quantities()["flops"] == modelled(1.2e8, "CostModel")
    spent.flops_per_token = measured(2e6, "counter")
    assert spent.quantities()["flops"] == measured(2.4e8, "counter")


def test_a_step_may_have_its_own_flops():
    """They stand in place of its tokens' and keep their label; a bare number is modelled."""
    spent = Ledger(meters=[], flops_per_token=measured(10, "counter"))
    for _ in range(3):
        spent.add(100, flops=measured(7, "counter of a step"))
    assert spent.quantities()["flops"] == measured(21, "counter of a step")
    spent.add(1)
    assert spent.quantities()["flops"] == measured(31, "counter of a step; counter")
    spent.add(1, flops=5)
    assert spent.quantities()["flops"].how == "modelled"
    assert spent.totals()["flops"] == 36
    assert spent.totals()["tokens"] == 302


def test_energy_is_the_meters(clock):
    """Only while the ledger runs; the carbon of it is modelled, since a factor is."""
    meter, other = FakeMeter(), FakeMeter()
    meter.shown = 50.0
    spent = Ledger(meters=[meter, other], watts=1e9, carbon=modelled(360, "360 g"))
    with spent:
        meter.shown += 1e6
        other.shown += 1e5
    meter.shown += 7e6
    with spent:
        meter.shown += 1e5
    quantities = spent.quantities()
    assert quantities["energy_joules"] == measured(1.2e6, "a fake meter and a fake meter")
    assert quantities["carbon_grams"] == modelled(120, "a fake meter and a fake meter; 360 g")


def test_without_a_meter_energy_is_modelled_or_absent(clock):
    """Watts times seconds times devices, if the watts are known; otherwise absent with a reason."""
    with Ledger(meters=[], watts=300, devices=2, carbon=modelled(400, "400 g")) as spent:
        clock.now += 60
    assert spent.quantities()["energy_joules"] == modelled(36000, "300 W for 2 devices each, as given")
    assert spent.quantities()["carbon_grams"].value == pytest.approx(4.0)
    with Ledger(meters=[], carbon=modelled(400, "400 g")) as spent:
        pass
    assert spent.quantities()["energy_joules"] == absent("no energy meter was given")
    assert spent.quantities()["carbon_grams"] == absent("no energy meter was given")
    with Ledger(meters=[], watts=300) as spent:
        pass
    assert "no carbon factor" in spent.quantities()["carbon_grams"].source


def test_a_missing_meter_has_its_reason(monkeypatch):
    """By default meters are looked for, once, and the reasons of those that are not there are the quantity's source."""
    calls = []

    def find(gpus):
        calls.append(gpus)
        return [], ["no RAPL: root only"]

    monkeypatch.setattr(ledger_module, "find_meters", find)
    spent = Ledger()
    with spent:
        pass
    with spent:
        pass
    assert spent.quantities()["energy_joules"] == absent("no RAPL: root only")
    assert len(calls) == 1


def test_a_meter_that_fails_ends_no_run(clock):
    """The energy is modelled from then on, or absent; earlier readings do not count as the whole."""
    for watts, how in ((10, "modelled"), (None, "absent")):
        meter = FakeMeter()
        with Ledger(meters=[meter], watts=watts) as spent:
            clock.now += 10
            meter.shown = 5000
            spent.look()
            meter.broken = True
            clock.now += 10
        quantity = spent.quantities()["energy_joules"]
        assert quantity.how == how
        assert quantity.value == (200 if watts else None)
    assert "it fell off the wall" in quantity.source


def test_add_looks_once_a_minute(clock):
    """So that no counter goes round between looks that are far apart; otherwise it reads nothing."""
    meter = FakeMeter()
    reads = []
    meter.joules = lambda: reads.append(clock.now) or 0.0
    with Ledger(meters=[meter]) as spent:
        reads.clear()
        for _ in range(150):
            clock.now += 1
            spent.add(1)
        assert reads == [161, 222]


@pytest.mark.parametrize(("make", "per_number"), [(torch.optim.AdamW, 8), (torch.optim.SGD, 0)])
def test_optimizer_states_are_weighed(make, per_number):
    """Adam keeps two float32 numbers and a step for each parameter, SGD nothing."""
    parameters = [torch.nn.Parameter(torch.zeros(100)), torch.nn.Parameter(torch.zeros(20))]
    optimizer = make(parameters, lr=0.1)
    spent = Ledger(meters=[])
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    spent.note_optimizer(optimizer)
    steps = 4 * 2 if per_number else 0
    assert spent.quantities()["optimizer_bytes"] == measured(120 * per_number + steps, "the optimizer's state tensors")


def test_shared_and_nested_states_count_once():
    """A table that all parameters share is one table; states in lists and mappings are states too."""
    parameters = [torch.nn.Parameter(torch.zeros(8)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    table = torch.zeros(256)
    for p in parameters:
        optimizer.state[p] = {"qmap": table, "absmax": [torch.zeros(2), {"x": torch.zeros(1)}], "step": 3, "kind": "q"}
    spent = Ledger(meters=[])
    spent.note_optimizer(optimizer)
    assert spent.totals()["optimizer_bytes"] == 4 * (256 + 2 * (2 + 1))


def test_a_resumed_run_goes_on_counting(clock):
    """Sums go on, peaks stay the largest, and the state is JSON."""
    meter = FakeMeter()
    settings = {"flops_per_token": modelled(10, "CostModel"), "carbon": modelled(36, "36 g"), "meters": [meter]}
    with Ledger(**settings) as first:
        first.add(100)
        clock.now += 30
        meter.shown += 1e6
        first.note_optimizer(stepped_adam())
        state = json.loads(json.dumps(first.state_dict()))
    with Ledger(**settings) as second:
        clock.now += 1000
        second.load_state_dict(state)
        assert second.quantities() == {name: Quantity.from_dict(f) for name, f in state["quantities"].items()}
        second.add(50)
        clock.now += 12
        meter.shown += 1e6
    totals = second.totals()
    assert (totals["tokens"], totals["flops"], totals["seconds"]) == (150, 1500, 42)
    assert totals["energy_joules"] == 2e6
    assert totals["carbon_grams"] == pytest.approx(20)
    assert totals["optimizer_bytes"] == first.totals()["optimizer_bytes"]
    assert second.peak_bytes >= first.peak_bytes
    assert second.quantities()["flops"] == modelled(1500, "CostModel")


def test_a_resumption_without_a_meter_takes_the_label_away(clock):
    """Measured before and modelled now is modelled; no longer counted is absent."""
    meter = FakeMeter()
    with Ledger(meters=[meter]) as first:
        meter.shown = 100.0
    for watts, expected in ((10, modelled(150, "a fake meter; 10 W for 1 device, as given")), (None, None)):
        second = Ledger(meters=[], watts=watts)
        second.load_state_dict(first.state_dict())
        assert second.quantities()["energy_joules"] == measured(100, "a fake meter"), "nothing was spent yet"
        with second:
            clock.now += 5
        found = second.quantities()["energy_joules"]
        assert found == expected if expected else found.how == "absent"


@pytest.mark.parametrize(
    "state", [{}, None, {"quantities": {"seconds": {"value": 1, "how": "measured"}}}, {"quantities": 3}]
)
def test_an_invalid_state_changes_nothing(state):
    """The error names the expected and the given value."""
    spent = Ledger(meters=[])
    spent.add(5)
    with pytest.raises(FormatError, match="The ledger's state"):
        spent.load_state_dict(state)
    assert spent.totals()["tokens"] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 0}, "devices must be a positive integer, got 0"),
        ({"devices": 1.5}, "devices must be a positive integer, got 1.5"),
        ({"watts": -3}, "watts must be a positive number, got -3"),
        ({"watts": "300"}, "watts must be a positive number, got '300'"),
        ({"flops_per_token": 1e9}, "flops_per_token must be a Quantity, got 1000000000.0"),
        ({"carbon": 300}, "carbon must be a Quantity, got 300"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    """Before anything is counted."""
    with pytest.raises(BlueprintError, match=message):
        Ledger(**settings)


def test_less_than_nothing_cannot_be_spent():
    """A difference taken the wrong way round is found where it is made."""
    with pytest.raises(BlueprintError, match="tokens must be at least 0, got -1"):
        Ledger(meters=[]).add(-1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_are_counted_with_attention(attention):
    """The counter agrees with two FLOPs per weight and token, and two products of attention, on a CPU as well."""
    model = tiny_llama(layers=2)
    model.set_attn_implementation(attention)
    batch, length, width, layers = 2, 40, 32, 2
    ids = torch.zeros((batch, length), dtype=torch.long)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    scores = layers * 4 * batch * length * length * width
    with counted_flops() as counted:
        loss = model(ids, labels=ids).loss
        assert counted.total == pytest.approx(2 * weights * batch * length + scores, rel=1e-3)
        loss.backward()
    backward_products = 4 if attention == "eager" else 5  # the kernel computes the scores again
    expected = 6 * weights * batch * length + scores * (1 + backward_products / 2)
    assert counted.total == pytest.approx(expected, rel=1e-3)
    assert counted.per_token(80) == measured(counted.total / 80, "torch.utils.flop_counter, one measurement")
    with pytest.raises(BlueprintError, match="tokens must be at least 1, got 0"):
        counted.per_token(0)


def test_keeping_the_ledger_asks_nothing_of_the_network(monkeypatch):
    """With all meters that there are and a country's carbon factor, from the start to the last quantity."""
    from peft_blueprint.runs.meters import carbon_factor

    def refuse(*_, **__):
        raise AssertionError("a socket was made")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    with Ledger(carbon=carbon_factor("FRA"), watts=50) as spent:
        with counted_flops() as counted:
            torch.ones(4, 4) @ torch.ones(4, 4)
        spent.add(4, flops=counted.per_token(1))
        spent.note_optimizer(stepped_adam())
    assert spent.quantities().keys() == UNITS.keys()
    assert spent.totals().keys() >= set(RESOURCES), "all that a return can be taken on"
    assert spent.totals()["flops"] == 128
    spent.load_state_dict(spent.state_dict())


def test_a_step_costs_microseconds():
    """Counting a step is far below 0.1 % of one of a tenth of a second, which is 100 µs."""
    with Ledger(meters=[], flops_per_token=modelled(1e9, "CostModel")) as spent:
        start = time.process_time()
        for _ in range(10_000):
            spent.add(1000)
        seconds = time.process_time() - start
    assert seconds / 10_000 < 20e-6


def stepped_adam():
    """AdamW after its first step, with states."""
    parameter = torch.nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer
