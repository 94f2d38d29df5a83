"""Recorded evaluations and training steps: the numbers of the code that they were recorded from, or a reason."""

import copy
import math
import operator
import pickle
import re
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_pyro_model import BY_VMAP, FEW, SIGMA, Y, branch, conjugate, eight_schools, many_supports, one_by_one, small

import vi_flows as vf
from vi_flows.inference.train import step as steps_module
from vi_flows.inference.train.loop import train
from vi_flows.inference.train.objectives import elbo
from vi_flows.inference.train.step import Flat, Gradient, ReverseKL
from vi_flows.targets import PyroModel
from vi_flows.targets.capture import CALLS_BEFORE_RECORDING, Captured
from vi_flows.targets.recording import METHODS, QUICK, NotRecordedError, Program, Recorder

PAGE = Path(__file__).parent.parent / "docs" / "recorder.md"
VALIDATES = "module"  # its distributions are made outside the model, so they validate, which reads values


def recorded(model, *args, **kwargs):
    target = PyroModel(model, *args, **kwargs)
    target.capture = True
    return target


def by_vmap(target):
    other = copy.copy(target)
    other.capture = False
    return other


def value_and_gradient(target, x):
    leaf = x.clone().requires_grad_()
    value = target.log_prob(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("name", BY_VMAP)
def test_recorded_models_give_the_numbers_of_vmap_and_of_single_evaluations(name):
    model, args, kwargs, dim = BY_VMAP[name]
    pyro.clear_param_store()
    target = recorded(model, *args, **kwargs)
    for scale in (0.5, 4.0):
        x = small(dim, scale=scale)
        value, gradient = value_and_gradient(target, x)
        expected = value_and_gradient(by_vmap(target), x)
        assert torch.allclose(value, expected[0], rtol=1e-10, equal_nan=True)
        assert torch.allclose(gradient, expected[1], rtol=1e-8, atol=1e-8, equal_nan=True)
        with torch.no_grad():
            assert torch.allclose(target.log_prob(x), one_by_one(target, x), rtol=1e-9, equal_nan=True)
    if name == VALIDATES:
        assert "reads values" in target.capture_refused and not target._captured.batches
    else:
        assert not target.capture_refused and len(target._captured.batches) == 2


def test_recorded_evaluations_run_without_the_model():
    calls = [0]

    def counted(y):
        calls[0] += 1
        conjugate(y)

    target = recorded(counted, FEW)
    value_and_gradient(target, small(1))
    before = calls[0]
    value, gradient = value_and_gradient(target, small(1, n=6, scale=2.0))
    assert calls[0] == before
    mean = small(1, scale=2.0)
    exact = dist.Normal(0.0, 1.0).log_prob(mean[:, 0]) + dist.Normal(mean, 1.0).log_prob(FEW.double()).sum(-1)
    assert torch.allclose(value, exact) and torch.allclose(gradient, FEW.double().sum() - 5 * mean)


def test_a_size_is_recorded_once_it_has_come_up_often_and_fewer_rows_are_filled_up():
    target = PyroModel(eight_schools, Y, SIGMA)
    for i in range(CALLS_BEFORE_RECORDING + 1):
        assert len(target._captured.batches) == 0, i
        value_and_gradient(target, small(10, n=40 + i % 3))
    assert [(b.rows, b.gradient) for b in target._captured.batches] == [(40 + CALLS_BEFORE_RECORDING % 3, True)]
    x = small(10, n=7)
    found, expected = value_and_gradient(target, x), value_and_gradient(by_vmap(target), x)
    assert len(target._captured.batches) == 1
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_hessians_and_transforms_go_through_the_model():
    target = recorded(eight_schools, Y, SIGMA)
    plain, x = by_vmap(target), small(10, n=2)
    hessian, expected = (
        torch.autograd.functional.hessian(lambda u, t=t: t.log_prob(u).sum(), x) for t in (target, plain)
    )
    assert target._captured.batches and torch.allclose(hessian, expected, rtol=1e-10)
    each = torch.func.vmap(torch.func.grad(lambda row: target.log_prob(row[None])[0]))(x)
    assert torch.allclose(each, value_and_gradient(plain, x)[1])


def test_cotangents_reach_the_rows_that_they_belong_to():
    target, x, weights = recorded(eight_schools, Y, SIGMA), small(10), torch.arange(6, dtype=torch.float64)
    gradients = []
    for each in (target, by_vmap(target)):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad((weights * each.log_prob(leaf)).sum(), leaf)[0])
    assert torch.allclose(*gradients) and bool((gradients[0][0] == 0).all())


def fails_far_out(y):
    m = pyro.sample("m", dist.Normal(0, 1).expand([2]).to_event(1))
    tril = torch.linalg.cholesky(torch.eye(2) * (4 - m.square().sum()))
    pyro.sample("y", dist.MultivariateNormal(m, scale_tril=tril), obs=y)


def test_a_row_that_fails_is_counted_and_leaves_the_others_alone():
    target = recorded(fails_far_out, FEW[:2])
    x = small(2, n=8)
    value_and_gradient(target, x)
    assert target._captured.batches and target.failed_rows == 0
    x[3] = 5.0
    value, gradient = value_and_gradient(target, x)
    assert target.failed_rows == 1 and value[3] == -math.inf and bool((gradient[3] == 0).all())
    others = torch.arange(8) != 3
    expected = value_and_gradient(by_vmap(target), x[others])
    assert torch.allclose(value[others], expected[0]) and torch.allclose(gradient[others], expected[1])


def test_tensors_changed_in_place_are_read_again():
    spread = torch.tensor([2.0], dtype=torch.float64)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, 1))
        pyro.sample("y", dist.Normal(mu, spread**2).expand([len(y)]).to_event(1), obs=y)

    target, x = recorded(model, FEW), small(1)
    first = target.log_prob(x)
    spread.mul_(2)
    changed = target.log_prob(x)
    assert torch.allclose(changed, by_vmap(target).log_prob(x)) and not torch.allclose(changed, first)


def test_what_is_rebound_is_read_again_after_forget():
    scale = [1.0]

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, scale[0]))
        pyro.sample("y", dist.Normal(mu, 1).expand([len(y)]).to_event(1), obs=y)

    target, x = recorded(model, FEW), small(1)
    first = target.log_prob(x)
    scale[0] = 3.0
    target.forget()
    assert not torch.allclose(target.log_prob(x), first)
    assert torch.allclose(target.log_prob(x), by_vmap(target).log_prob(x))


def test_tensors_that_require_gradients_are_left_in_the_graph():
    slope = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, 1))
        pyro.sample("y", dist.Normal(slope * mu, 1).expand([len(y)]).to_event(1), obs=y)

    target = recorded(model, FEW)
    target.log_prob(small(1)).sum().backward()
    assert "require gradients" in target.capture_refused and slope.grad != 0


def test_other_modes_are_not_captured_and_the_fit_says_so():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = recorded(branch, FEW)
    assert target.capture_refused == "it is evaluated by loop" and not target._captured.batches


def test_to_copies_and_pickles():
    target, x = recorded(many_supports), small(12)
    value = target.log_prob(x)
    single = target.to(torch.float32)
    assert single.capture is True and torch.allclose(single.log_prob(x), value, rtol=1e-4)
    assert torch.equal(copy.deepcopy(target).log_prob(x), value)
    captured = pickle.loads(pickle.dumps(Captured(torch.square)))
    assert captured.fn is torch.square and not captured.batches


def test_the_default_dtype_is_that_of_the_recording():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0, 1))
        pyro.factor("step", (mu > 0) * 0.1 + torch.zeros(2).index_fill(0, torch.tensor(0), 0.3).sum())
        pyro.sample("y", dist.Normal(mu, 1).expand([len(y)]).to_event(1), obs=y)

    target, x = recorded(model, FEW), small(1)
    target.log_prob(x)
    assert torch.equal(target.log_prob(x), by_vmap(target).log_prob(x))


KEPT = torch.zeros(3)
REFUSED = {
    "random numbers": (lambda x: (x * torch.rand_like(x),), "draws random numbers"),
    "an item": (lambda x: (x * float(x.sum()),), "reads values"),
    "a branch": (lambda x: (x if x.sum() > 0 else -x,), "reads values"),
    "a mask": (lambda x: (x[x > 0].sum(),), "reads values"),
    "its input": (lambda x: (x.mul_(2),), "in place"),
    "a tensor of its own": (lambda x: (KEPT.add_(x).clone(),), "in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_more_than_its_input_is_not_recorded(name):
    fn, reason = REFUSED[name]
    with pytest.raises(NotRecordedError, match=reason):
        Program(fn, torch.tensor([1.0, 2.0, -3.0]))


def test_a_program_writes_in_place_where_the_function_did():
    def fn(x, y):
        table = torch.zeros(3, 2)
        table[0] = x
        first = table.sum()
        table[1] = y
        half = 0.5 * torch.ones(2)
        return table * half, first, torch.cumsum(table, 0), (x + y) * (x + y)

    x, y, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]), torch.tensor([-1.0, 0.5])
    program = Program(fn, x, y)
    for inputs in ((x, y), (other, x), (y, other)):
        assert all(torch.equal(a, b) for a, b in zip(program(*inputs), fn(*inputs), strict=True))
    assert "c" in program.source and program.current()


def test_nothing_is_computed_twice_or_for_nothing():
    constant = torch.tensor([2.0, 3.0])

    def fn(x):
        unused = x.exp().sum()  # noqa: F841
        return (torch.log(constant) * x.sin() + x.sin(),)

    program, x = Program(fn, torch.ones(2)), torch.tensor([0.3, 0.4])
    assert torch.equal(program(x)[0], fn(x)[0])
    assert program.source.count(" = f") == 3  # sin, mul, add


def test_the_worked_example_of_the_page_on_the_recorder():
    code, printed = re.findall(r"```(?:python)?\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    x, scale = torch.randn(4, 3), names["scale"]
    program = Program(names["log_p"], x)
    assert program.source == printed.strip() and program.operations == 5
    assert torch.allclose(program(x)[0], dist.Normal(0.0, scale).log_prob(x).sum(-1) + 1.5 * math.log(2 * math.pi))
    space = program.run.__globals__
    assert [space[f] for f in ("f1", "f2", "f4", "f6", "f8")] == [torch.div, torch.pow, torch.sum, torch.mul, torch.sub]
    assert (space["c3"], space["c5"], float(space["c7"])) == (torch.float32, -0.5, float(scale.log().sum()))
    with Recorder((x,)) as recorder:
        names["log_p"](x)
    dispatched = re.findall(r"^\| `(aten\.\S+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [str(o.op) for o in recorder.operations] == dispatched


@pytest.mark.parametrize("name", re.findall(r"^\| `torch\.(\S+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
def test_what_is_private_in_torch_is_still_there(name):
    operator.attrgetter(name)(torch)


def test_quick_names_are_operations():
    assert all(hasattr(torch, name) and hasattr(torch.ops.aten, name) for name in QUICK)
    assert all(hasattr(torch.Tensor, name) and hasattr(torch.ops.aten, name) for name in METHODS)


def test_a_recorder_sees_operations_only_while_it_is_active():
    x = torch.ones(2)
    with Recorder((x,)) as recorder:
        x + 1
    x * 2
    assert [o.op.overloadpacket.__name__ for o in recorder.operations] == ["add"]


def gradient_of(recipe, target, path=True, **kwargs):
    torch.manual_seed(0)
    step = ReverseKL(getattr(vf.recipes, recipe)(target.dim).double(), target, elbo, path)
    flat = Flat(step)
    return Gradient(step, flat, **kwargs), flat.vector, step.flow.base


CURVED = vf.LogDensity(lambda x: -0.5 * (x.square().sum(-1) + (x[:, 0] - x[:, 1].square()) ** 2), dim=3)


@pytest.mark.parametrize("path", [False, True], ids=["total", "path"])
@pytest.mark.parametrize("recipe", vf.recipes.__all__)
def test_recorded_steps_give_the_numbers_of_eager_ones(recipe, path):
    gradient, vector, base = gradient_of(recipe, CURVED, path)
    for i in range(steps_module.STEPS_BEFORE_RECORDING + 3):
        noise = base.noise((16,))
        found, expected = gradient(vector, noise), gradient.eagerly(vector, noise)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True))
        assert (gradient.run is not None) == (i >= steps_module.STEPS_BEFORE_RECORDING)
        vector = vector - 0.01 * found[0]
    assert not gradient.refused


@pytest.mark.parametrize(
    ("log_p", "reason"),
    [
        (lambda x: -x.square().sum(-1) * (2 if float(x.detach().sum()) > 0 else 1), "reads values"),
        (lambda x: -x.square().sum(-1) + torch.rand(len(x)), "random numbers"),
        (lambda x: -(x - torch.from_numpy(x.detach().numpy().mean(0))).square().sum(-1), "reads values"),
        (lambda x: -x.square().sum(-1) * (2 if max(map(max, x.detach().tolist())) > 5 else 1), "reads values"),
    ],
    ids=["branch", "random", "numpy", "tolist"],
)
def test_steps_that_cannot_be_recorded_stay_eager(log_p, reason):
    gradient, vector, base = gradient_of("gaussian", vf.LogDensity(log_p, dim=2))
    for _ in range(steps_module.STEPS_BEFORE_RECORDING + 2):
        gradient(vector, base.noise((8,)))
    assert gradient.run is None and reason in gradient.refused


def test_operations_that_change_shapes_in_place_are_recorded():
    linear = torch.nn.Linear(3, 1).double().requires_grad_(False)  # under vmap it ends in squeeze_

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.factor("f", -linear(w).square().sum())

    target = PyroModel(model)
    target.capture = True
    x = torch.randn(9, 3, dtype=torch.float64)
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - linear(x).square().sum(-1)
    for _ in range(3):
        assert torch.allclose(target.log_prob(x), expected, rtol=1e-12) and not target.capture_refused


def test_a_recorded_step_that_raises_is_done_eagerly():
    target = PyroModel(fails_far_out, FEW[:2])
    gradient, vector, base = gradient_of("gaussian", target)
    for _ in range(steps_module.STEPS_BEFORE_RECORDING + 1):
        gradient(vector, 0.1 * base.noise((8,)))
    assert gradient.run is not None and target.failed_rows == 0
    noise = 0.1 * base.noise((8,))
    noise[2] = 9.0
    found, log_w = gradient(vector, noise)
    assert target.failed_rows == 1 and log_w[2] == -math.inf and bool(found.isfinite().all())


@pytest.mark.parametrize("flow", ["gaussian", "planar"])
def test_fits_agree_with_and_without_capture(flow):
    options = {"flow": flow, "steps": 40, "particles": 32, "num_draws": 500, "progress": False}
    recorded_fit = vf.fit(conjugate, FEW, **options)
    plain = vf.fit(conjugate, FEW, capture=False, **options)
    assert recorded_fit.trace == pytest.approx(plain.trace, rel=1e-6)
    assert recorded_fit.log_evidence == pytest.approx(plain.log_evidence, abs=1e-4)
    assert not any("capture" in note for note in (*recorded_fit.notes, *plain.notes))


def test_a_fit_told_to_capture_says_why_it_could_not():
    model, args, _, _ = BY_VMAP[VALIDATES]
    post = vf.fit(model, *args, capture=True, steps=2, num_draws=500, progress=False)
    assert sum("capture: the model's evaluations were not recorded: its Python reads" in n for n in post.notes) == 1
    shy = vf.LogDensity(lambda x: -x.square().sum(-1) * (2 if float(x.detach().sum()) > 1e9 else 1), dim=2)
    post = vf.fit(shy, capture=True, num_draws=500, steps=20, progress=False)
    assert sum("capture: the training step was not recorded: its Python reads" in n for n in post.notes) == 1


@pytest.mark.parametrize(("option", "value"), [("capture", "always"), ("capture", 1), ("compile", "yes")])
def test_options_are_checked(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected"):
        vf.fit(conjugate, FEW, progress=False, **{option: value})


def test_a_compiled_step_gives_the_eager_numbers():
    options = torch._inductor.config.compile_threads if "_inductor" in vars(torch) else None
    gradient, vector, base = gradient_of("gaussian", CURVED, compiled=True)
    for _ in range(2):
        noise = base.noise((16,))
        found, expected = gradient(vector, noise), gradient.eagerly(vector, noise)
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(found, expected, strict=True))
    if gradient.note:
        pytest.skip(gradient.note)  # no compiler on this machine
    assert gradient.run is not None and gradient.run is not gradient.program
    assert options is None or torch._inductor.config.compile_threads == options


def test_a_step_that_cannot_be_compiled_is_trained_eagerly_and_said_in_one_line(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no C++ compiler found\nlong story")

    monkeypatch.setattr(steps_module, "_compile", no_compiler)
    options = {"steps": 30, "particles": 32, "path": True}
    torch.manual_seed(1)
    plain = train(vf.recipes.gaussian(3).double(), CURVED, **options)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="compile: the training step was not compiled") as caught:
        result = train(vf.recipes.gaussian(3).double(), CURVED, compile=True, **options)
    assert len(caught) == 1 and "\n" not in result.note and "RuntimeError: no C++ compiler found" in result.note
    assert result.elbo == pytest.approx(plain.elbo)
    with pytest.warns(UserWarning, match="compile"):
        post = vf.fit(CURVED, compile=True, num_draws=500, steps=20, progress=False)
    assert sum(result.note in note for note in post.notes) == 1
