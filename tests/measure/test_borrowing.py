"""A model is given back bit for bit, also after errors. Run: pytest tests/measure/test_borrowing.py"""

import os
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import peft_blueprint
from peft_blueprint import measure_influence
from peft_blueprint.data import predictor, select_examples
from peft_blueprint.data.brief_training import restore_afterwards, temporary_adapters, train_briefly
from peft_blueprint.data.features import model_features
from peft_blueprint.errors import MeasurementError
from peft_blueprint.measure import borrowed
from peft_blueprint.testing import tiny_llama, toy_batches
from peft_blueprint.train import (
    PromptCache,
    answer_only,
    cache_frozen_prefix,
    check_adapters,
    head_on_targets,
    held_out_loss,
    initialize_along_gradient,
)


PACKAGE = str(Path(peft_blueprint.__file__).parent)
BATCHES = toy_batches(examples=2, length=6, batch_size=2)
ROWS = [{"input_ids": [5, 6, 7 + i], "labels": [5, 6, 7 + i]} for i in range(20)]
PLACES = int(os.environ.get("PLACES", 2))  # lines of a call that are interrupted, and as many at its end
OPTIONS = {"progress": False}


@pytest.fixture(autouse=True)
def quick_predictors(monkeypatch):
    """Selection fits ridge regressions alone; the others take most of its time, without the model."""
    ridge = predictor._candidates(0)["ridge"]
    monkeypatch.setattr(predictor, "_candidates", lambda seed: {"ridge": ridge, "boosted trees": ridge})


def lent(layers=1):
    """A model in the middle of a training: adapted, in training mode, checkpointed, with gradients, hooks and a buffer."""
    model = get_peft_model(tiny_llama(layers, attention_dropout=0.3), LoraConfig(r=2, target_modules=["up_proj"]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    norm = model.base_model.model.model.norm
    norm.eval().register_buffer("mean", torch.ones(3))

    def count(module, args):
        module.mean.add_(1.0)

    norm.register_forward_pre_hook(count)
    model(**BATCHES[0]).loss.backward()
    return model


def state_of(model):
    """Everything that must be the same afterwards, in a form that can be compared."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {
        name: (module.training, sorted(vars(module)), [list(vars(module)[key]) for key in hooks])
        for name, module in model.named_modules()
    }
    parameters = {
        name: (
            p.requires_grad,
            id(p.grad),
            None if p.grad is None else p.grad.numpy().tobytes(),
            len(p._backward_hooks or ()),
            len(p._post_accumulate_grad_hooks or ()),
        )
        for name, p in model.named_parameters()
    }
    return {
        "modules": modules,
        "parameters": parameters,
        "values": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        "checkpointing": [vars(m).get("gradient_checkpointing") for m in model.modules()],
        "random": (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()),
        "autograd": torch.is_grad_enabled(),
    }


def measure(model):
    measure_influence(model, BATCHES, include="all", projection_size=3, **OPTIONS)


def start(model):
    initialize_along_gradient(model, BATCHES, **OPTIONS)


def select(model):
    select_examples(
        model, ROWS, count=2, method="iterative", small=16, iterations=2, train_steps=1, deduplicate=False, **OPTIONS
    )


def train_in_place(model):
    def disturb(model, rows):
        random.random(), np.random.rand(), torch.rand(1)
        model.eval().requires_grad_(True)
        model.extra = torch.nn.Linear(2, 2)
        model(**BATCHES[0]).loss.backward()
        with torch.no_grad():
            [p.add_(1.0) for p in model.parameters()]

    with restore_afterwards(model):
        disturb(model, ROWS)


def train_with_new_adapters(model):
    with temporary_adapters(model.unload(), None, seed=0) as adapted:
        train_briefly(adapted, ROWS, 1, batch_size=2, pad_token_id=0)


BORROWERS = {
    "measuring": measure,
    "features": lambda model: model_features(model, BATCHES),
    "held-out loss": lambda model: held_out_loss(model, BATCHES, **OPTIONS),
    "checking adapters": lambda model: check_adapters(model, BATCHES),
    "starting": start,
    "iterative selection": select,
    "training in place": train_in_place,
}


def lines_run(act):
    """Count the lines of the package that a call runs, in this thread."""
    return interrupted(act, at=None)


def interrupted(act, at, lines=None):
    """Call, raising KeyboardInterrupt at line number `at` of the package; return the number of lines, and append them."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            seen += 1
            if lines is not None:
                lines.append((frame.f_code.co_filename, frame.f_lineno))
            if seen == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return seen


@pytest.mark.parametrize("name", BORROWERS)
def test_the_model_is_given_back_after_success(name):
    """Weights, gradients, hooks, flags and random states; starting changes A alone."""
    model = lent()
    before = state_of(model)
    BORROWERS[name](model)
    after = state_of(model)
    values, others = before.pop("values"), after.pop("values")
    changed = {key for key, value in values.items() if others[key] != value}
    assert changed == ({key for key in values if "lora_A" in key} if name == "starting" else set())
    assert after == before


@pytest.mark.parametrize("name", BORROWERS)
def test_the_model_is_given_back_after_an_interrupt_at_any_line(name):
    """A KeyboardInterrupt at lines spread over the whole call, and at each of the last ones."""
    model = lent()
    before = state_of(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    BORROWERS[name](model)  # fills caches, so that later calls run the same lines
    model.load_state_dict(values)
    count = lines_run(lambda: BORROWERS[name](model))
    model.load_state_dict(values)
    rng = random.Random(name)
    state = random.getstate()
    places = {*rng.sample(range(1, count + 1), PLACES), *range(count - PLACES, count + 1)}
    for place in sorted(places):
        with pytest.raises(KeyboardInterrupt):
            interrupted(lambda: BORROWERS[name](model), place)
        random.setstate(state)
        assert state_of(model) == before, f"line {place} of {count}"


def test_new_adapters_are_gone_after_an_interrupt_at_any_line():
    """PEFT has replaced the layers by then."""
    model = tiny_llama(layers=1)
    before = state_of(model)

    def train():
        with temporary_adapters(model, None, seed=0) as adapted:
            train_briefly(adapted, ROWS, 1, batch_size=2, pad_token_id=0)

    count = lines_run(train)
    for place in random.Random(0).sample(range(1, count + 1), PLACES):
        with pytest.raises(KeyboardInterrupt):
            interrupted(train, place)
        assert state_of(model) == before, f"line {place} of {count}"


def answering(checkpointed):
    config = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8], use_rslora=True
    )
    model = answer_only(get_peft_model(tiny_llama(1), config), cache=PromptCache("1MiB")).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def answer(model):
    model(
        input_ids=torch.tensor([[5, 6, 9, 7, 8, 10, 11]]), labels=torch.tensor([[-100] * 5 + [10, 11]])
    ).loss.backward()
    model.zero_grad()


def cached_prefix(model):
    with cache_frozen_prefix(model, budget="1MiB"):
        [model(**BATCHES[0]) for _ in range(2)]


STEPS = {
    "answer-only": (lambda: answering(False), answer),
    "head on targets": (lambda: head_on_targets(tiny_llama(1)).train(), lambda model: model(**BATCHES[0])),
    "frozen prefix": (lambda: get_peft_model(tiny_llama(2), LoraConfig(target_modules="lm_head")), cached_prefix),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a temporary file closed late
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_leaves_nothing_on_the_model_after_an_interrupt(name):
    """No hook, forward, checkpointing flag, loss function or missing cache, at any line of train/; a later step works."""
    make, act = STEPS[name]

    def attributes(model):
        setup = getattr(model, "_answer_only", None)
        return [
            {
                key: list(value.items()) if isinstance(value, dict) else value
                for key, value in vars(m).items()
                if key != "_answer_only" and not isinstance(value, torch.Tensor)
            }
            for m in model.modules()
        ] + [None if setup is None else setup.cache]

    model, lines = make(), []
    model.train()
    interrupted(lambda: act(model), None, lines)
    last = {place: i for i, place in enumerate(lines, 1) if os.sep + "train" + os.sep in place[0]}
    count = min(len(last), 5 * PLACES)
    for place in [*random.Random(name).sample(sorted(last.values()), count), *sorted(last.values())[-PLACES:]]:
        model = make()
        model.train()
        before = attributes(model)
        with pytest.raises(KeyboardInterrupt):
            interrupted(lambda model=model: act(model), place)
        assert attributes(model) == before, lines[place - 1]
    act(model)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT's, with older versions of torch
def test_a_checkpointed_step_works_after_an_interrupted_one():
    """PEFT's hooks for the second forward pass, which no backward pass removes, are gone."""
    model = answering(True)

    def interrupt(*_):
        hook.remove()
        raise KeyboardInterrupt

    hook = model.base_model.model.lm_head.register_forward_pre_hook(interrupt)
    model._answer_only.is_checked = True  # so that the interrupt comes in the step itself
    with pytest.raises(KeyboardInterrupt):
        answer(model)
    answer(model)


def test_two_borrowers_at_once_are_refused_and_leave_nothing():
    """From a loss function, from the batches, from another thread, and of a part of the model."""
    model = tiny_llama(layers=1)
    before = state_of(model)

    def measuring_batches():
        measure(model)
        yield from BATCHES

    with pytest.raises(MeasurementError, match="is being measured already"):
        measure_influence(model, BATCHES, loss_fn=lambda m, b: measure(m), **OPTIONS)
    with pytest.raises(MeasurementError, match="is being measured already"):
        measure_influence(model, measuring_batches(), **OPTIONS)
    entered, leave, failures = threading.Event(), threading.Event(), []

    def hold():
        with borrowed(model.model.layers[0]):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    with pytest.raises(MeasurementError, match="in another thread"):
        measure(model)
    leave.set()
    thread.join()

    def try_to_measure():
        try:
            barrier.wait(10)
            measure(model)
        except MeasurementError as error:
            failures.append(str(error))

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=try_to_measure) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all("in another thread" in text for text in failures) and len(failures) < 2
    assert state_of(model) == before | {"random": state_of(model)["random"]}
    measure(model)


def test_batch_norms_keep_their_statistics():
    """A pass in training mode looks which layers are called there; it must not show in the measurement."""

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.down(self.norm(self.up(x).mT).mT)

    torch.manual_seed(0)
    model, batch = Normed().train(), {"x": torch.randn(3, 5, 4)}
    before = state_of(model)
    influence = measure_influence(model, [batch], loss_fn=lambda m, b: m(b["x"]).square().mean((1, 2)), **OPTIONS)
    assert state_of(model) == before
    expected = model.eval()(batch["x"]).square().mean((1, 2))
    torch.testing.assert_close(influence.losses, expected.detach())
