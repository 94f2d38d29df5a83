"""Targets: the table of malformed densities that are refused in one line, and those that are survived."""

import math
import re
import warnings

import pytest
import torch

from vi_flows.inference.estimate.evaluate import value_and_grad
from vi_flows.targets import Energy, LogDensity, Target, check_finite, check_target, resolve_target, settle_dtype
from vi_flows.targets.values import BELIEVED, precision_of, told_of_values

DIM = 2
N = 48


def normal(x):
    return -0.5 * (x**2).sum(-1)


def points(n=N, dim=DIM):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def in_place(x):
    x -= 1.0
    return normal(x)


def nan_at_some(x):
    return torch.where(x[:, 0] > 1.5, torch.nan, normal(x))


def nan_gradient(x):
    return torch.where(x[:, 0] > 0, x[:, 0].sqrt(), 0 * x[:, 0]) + normal(x)


def wrong_backward(x):
    return normal(x.detach()) + 0.1 * x.sum(-1)


def fails(x):
    raise KeyError("weights")


REFUSED = {
    "shape (N, 1)": (lambda x: normal(x)[:, None], r"shape \(48,\), got \(48, 1\); return log_prob\(x\).squeeze\(-1\)"),
    "shape ()": (lambda x: normal(x).sum(), r"got \(\); sum over the coordinates only"),
    "shape (N, D)": (lambda x: -0.5 * x**2, r"got \(48, 2\); sum over the coordinates"),
    "shape (N - 1,)": (lambda x: normal(x)[1:], r"got \(47,\); return one value per row"),
    "numpy array": (lambda x: normal(x).numpy(), "got ndarray; compute it with torch"),
    "Python float": (lambda x: 1.0, "got float; compute it with torch"),
    "None": (lambda x: None, "got NoneType; compute it with torch"),
    "integers": (lambda x: normal(x).long(), "got dtype torch.int64; return a real"),
    "complex": (lambda x: normal(x) + 0j, "got dtype torch.complex128; return a real"),
    "other device": (lambda x: normal(x).to("meta"), "on cpu, got one on meta; keep the result"),
    "NaN everywhere": (lambda x: normal(x) * math.nan, "got NaN at all 48 points"),
    "inf everywhere": (lambda x: normal(x) + math.inf, "got inf at all 48 points, .*; check data and formula"),
    "a constant too large": (lambda x: normal(x) + 1e17, r"got 1e\+17 at all 48 points, .*subtract a constant"),
    "-inf everywhere": (lambda x: normal(x) - math.inf, "got -inf at all 48 points"),
    "summed over the batch": (lambda x: normal(x).sum().expand(len(x)), "each row's value to depend on that row only"),
    "batch-normalised": (
        lambda x: normal((x - x.mean(0)) / x.std(0, correction=0)),
        "each row's value to depend on that row",
    ),
    "detached": (lambda x: normal(x.detach()), "got one without a graph; remove .detach"),
    "numpy inside": (lambda x: torch.from_numpy(normal(x).numpy()), "RuntimeError: Can't call numpy"),
    "constant": (lambda x: 0 * x[:, 0] + 3, "expected a density that varies, got 3 at all 48"),
    "constant, without x": (
        lambda x: torch.zeros(len(x), dtype=x.dtype),
        "expected a density that varies, got 0 at all",
    ),
    "steps": (lambda x: x[:, 0].round() + x[:, 1].round(), "expected a gradient, got 0 at all"),
    "a coordinate unused": (lambda x: normal(x[:, :1]), r"no dependence on x\[:, 1\]"),
    "random": (lambda x: normal(x) + torch.randn(len(x), dtype=x.dtype), "the same value for the same x, got"),
    "gradient NaN at finite values": (nan_gradient, "expected a finite gradient, got "),
    "gradient of another function": (wrong_backward, "expected its gradient to be its slope"),
    "raises": (fails, r"got KeyError: 'weights'; check dim and dtype"),
    "another dim": (
        lambda x: normal(x @ torch.ones(3, 3, dtype=x.dtype)),
        "got RuntimeError: mat1 and mat2 shapes cannot be mult",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("settle", [False, True], ids=["check", "settle"])
def test_malformed_density_is_refused_in_one_line(name, settle):
    fn, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        (settle_dtype if settle else check_target)(LogDensity(fn, dim=DIM), points())
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    assert "expected" in text and "got" in text and ";" in text


SURVIVED = {
    "in place on its input": (in_place, torch.float64),
    "float32 from float64": (lambda x: normal(x).float(), torch.float32),
    "float32 inside": (lambda x: normal(x.float() * 1.1).double(), torch.float32),
    "float32 tensors of its own": (lambda x: normal(x @ torch.eye(2)), torch.float32),
    "unbounded above": (lambda x: 0.5 * (x**2).sum(-1), torch.float64),
    "large offset": (lambda x: normal(x) - 1e8, torch.float64),
    "float32 near 1e8, in float64": (lambda x: (normal(x.float()) + 1e8).double(), torch.float32),
    "stiff": (lambda x: normal(x * torch.tensor([1e4, 1e-3], dtype=x.dtype)), torch.float64),
    "kinks": (lambda x: -x.abs().sum(-1), torch.float64),
    "banana": (lambda x: -0.5 * x[:, 0] ** 2 - 50 * (x[:, 1] - x[:, 0] ** 2) ** 2, torch.float64),
    "network": (
        torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1), torch.nn.Flatten(0)),
        torch.float32,
    ),
}


@pytest.mark.parametrize("name", SURVIVED)
def test_unusual_density_is_survived(name):
    fn, dtype = SURVIVED[name]
    x = points()
    before = x.clone()
    target = settle_dtype(LogDensity(fn, dim=DIM), x)
    assert target.dtype == dtype
    assert torch.equal(x, before)
    z = x.clone().requires_grad_()
    log_p = target.log_prob(z)
    assert log_p.dtype == torch.float64 and log_p.shape == (N,)
    (gradient,) = torch.autograd.grad(log_p.sum(), z)
    assert gradient.dtype == torch.float64 and bool(gradient.isfinite().all())


def test_check_report():
    report = check_target(LogDensity(normal, dim=DIM), points())
    assert (report.points, report.finite, report.precision) == (N, N, torch.float64)


def test_one_dimensional_density():
    check_target(LogDensity(lambda x: -(x[:, 0] ** 2), dim=1), points(dim=1))
    with pytest.raises(ValueError, match="squeeze"):
        check_target(LogDensity(lambda x: -(x**2), dim=1), points(dim=1))


def test_energy_is_the_negative():
    x = points()
    assert torch.equal(Energy(lambda x: -normal(x), dim=DIM).log_prob(x), LogDensity(normal, dim=DIM).log_prob(x))
    with pytest.raises(ValueError, match=r"^energy: expected .* return energy\(x\)"):
        check_target(Energy(lambda x: x[:, :1], dim=DIM), points())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3.0, 2), TypeError, "fn: expected a callable"),
        ((normal, 2.0), TypeError, "dim: expected a positive int, got 2.0"),
        ((normal, True), TypeError, "dim: expected a positive int, got True"),
        ((normal, 0), ValueError, "dim: expected a positive int, got 0"),
        ((normal, 2, "ignore"), ValueError, "nonfinite: expected one of"),
    ],
)
def test_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LogDensity(*arguments)


@pytest.mark.parametrize(
    "x", [torch.zeros(3), torch.zeros(4, 3), torch.zeros(2, 2, 2), torch.zeros(1, 2), torch.zeros(4, 2).long()]
)
def test_points_of_another_shape(x):
    with pytest.raises(ValueError, match=r"^x: expected at least 2 points, floats of shape \(N, 2\)"):
        check_target(LogDensity(normal, dim=DIM), x)


def test_log_prob_wants_one_point_per_row():
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 2\), got \(2,\)"):
        LogDensity(normal, dim=DIM).log_prob(torch.zeros(2))


HOLES = {
    "NaN at 5 % of points": (nan_at_some, r"got nan at x = \[.*\] \(\d of 48 points\)"),
    "NaN in a half-space": (lambda x: normal(x) + 0 * x[:, 0].log(), r"got nan at x = .* \(\d\d of 48 points\)"),
    "+inf": (lambda x: torch.where(x[:, 0] > 1, math.inf, normal(x)), "got inf at x = "),
    "-inf outside a box": (lambda x: torch.where(x[:, 0] > 1, -math.inf, normal(x)), "got -inf at x = .*constraint in"),
    "a jump to 1e307": (lambda x: torch.where(x[:, 0] > 1, 1e307, normal(x)), r"got 1e\+307 at x = "),
}


@pytest.mark.parametrize("name", HOLES)
def test_points_without_a_value_beside_high_ones_are_warned_of_and_count_as_minus_inf(name):
    fn, message = HOLES[name]
    with pytest.warns(UserWarning, match=message) as caught:
        report = check_target(LogDensity(fn, dim=DIM), points())
    assert 0 < report.finite < report.points
    assert len(caught) == 1 and len(str(caught[0].message)) < 400
    told = told_of_values(LogDensity(fn, dim=DIM), points()[:0], points()[:0, 0])
    assert len(told) == 1 and re.match(r"log p has no value to believe in \d+% of the box of side 4", told[0])


def overflowing(x):
    """A Poisson trend on calendar years: rates overflow in a good part of the box around 0."""
    eta = x[:, :1] + x[:, 1:] * torch.arange(1990.0, 2011.0, dtype=x.dtype)
    return (20 * eta - eta.exp()).sum(-1) - 0.5 * (x[:, 0] / 100) ** 2 - 0.5 * x[:, 1] ** 2


@pytest.mark.parametrize("worse", [0.0, math.nan, math.inf])
def test_overflow_far_from_all_mass_passes_without_a_word(worse):
    def fn(x):
        log_p = overflowing(x)
        return torch.where(log_p == -math.inf, worse, log_p) if worse else log_p

    target, x = LogDensity(fn, dim=DIM), 2 * points().clamp(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check_target(target, x)
        log_p, count = check_finite(target.log_prob(x), x, target)
    assert 0.2 * N < N - report.finite < 0.8 * N
    assert int((log_p == -math.inf).sum()) == N - report.finite
    assert count == (N - report.finite if math.isnan(worse) else 0)
    assert told_of_values(LogDensity(normal, dim=DIM), x, log_p) == []


def unstable(x):
    """A filter of an AR(1) with coefficient 3 tanh x₀ by a recursion that is right while it is stable: beyond, the
    squares in its two sums cancel at the size of the largest, and log p ends anywhere up to 1e307."""
    phi, log_p = 3 * x[:, :1].tanh(), -0.5 * (x[:, 1:] / 0.1).square()
    mean = torch.ones_like(phi)
    for k in range(320):
        log_p = log_p - 0.5 * (mean - 0.5**k).square() + (mean.square() - 1).clamp(min=0)
        mean = phi * mean
    return log_p.squeeze(-1)


def test_finite_values_of_overflow_are_not_believed():
    target, x = LogDensity(unstable, dim=DIM), 2 * points(200).clamp(-1, 1)
    raw, log_p = unstable(x), target.log_prob(x)
    garbage = raw > BELIEVED
    assert int(garbage.sum()) > 50 and float(raw[garbage].max()) > 1e250
    assert bool((log_p[garbage] == -math.inf).all()) and torch.equal(log_p[~garbage], raw[~garbage])
    assert any(f"at {int(garbage.sum())} draws" in told for told in told_of_values(target, x, log_p))
    value, gradient = value_and_grad(target, x)
    assert bool((value[garbage] == -math.inf).all()) and bool((gradient[garbage] == 0).all())
    with pytest.warns(UserWarning, match="counts as no density"):
        assert check_target(target, x).finite == 200 - int(garbage.sum())


def test_large_constants_are_believed_up_to_a_nat():
    for constant in (1e10, -1e300):
        x = points()
        assert torch.equal(LogDensity(lambda x, c=constant: normal(x) + c, dim=DIM).log_prob(x), normal(x) + constant)


def test_nonfinite_policies():
    x = points(1000)
    target, skipping = LogDensity(normal, dim=DIM), LogDensity(normal, dim=DIM, nonfinite="skip")
    log_p = target.log_prob(x)
    assert check_finite(log_p, x, target) == (log_p, 0)
    few = log_p.index_fill(0, torch.tensor([7, 9]), math.inf)
    hole = LogDensity(lambda y: torch.where((y - x[7]).norm(dim=-1) < 1e-3, math.nan, normal(y)), dim=DIM)
    with pytest.raises(ValueError, match=r"got nan at x = \[.*\] \(1 of 1000 points\), beside values that matter"):
        check_finite(hole.log_prob(x), x, hole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replaced, count = check_finite(few, x, skipping)
    assert count == 2 and replaced[7] == -math.inf and torch.equal(replaced[10:], log_p[10:])
    for some in (20, 201, 1000):  # the weights' verdict decides how many are too many
        with pytest.warns(UserWarning, match="skipped nan at x"):
            assert check_finite(log_p.index_fill(0, torch.arange(some), math.nan), x, skipping)[1] == some
    minus = log_p.index_fill(0, torch.arange(500), -math.inf)
    assert check_finite(minus, x, target)[1] == 0


def test_skipping_target_passes_the_check():
    with pytest.warns(UserWarning, match="beside values that matter"):
        report = check_target(LogDensity(nan_at_some, dim=DIM, nonfinite="skip"), points())
    assert report.finite < report.points


PRECISIONS = {
    "float64": (normal, torch.float64),
    "float32 at last": (lambda x: normal(x).float(), torch.float32),
    "float32 inside": (lambda x: normal(x.float()).double(), torch.float32),
    "float32 in one of two terms": (lambda x: normal(x) + normal(x.float()), torch.float32),
    "half inside": (lambda x: normal(x.half()).double(), torch.float16),
    "float32 constants": (lambda x: normal(x - torch.ones(DIM)), torch.float64),
    "a float32 mask": (lambda x: normal(x) + (x[:, 0] > 0).float(), torch.float64),
    "NumPy in float32": (lambda x: torch.from_numpy(normal(x).detach().numpy().astype("f4")).double(), torch.float32),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_coarsest_precision_is_found(name):
    fn, dtype = PRECISIONS[name]
    assert precision_of(LogDensity(fn, dim=DIM), points()) == dtype


class Custom(Target):
    dim = DIM

    def log_prob(self, x):
        return normal(x)

    def constrain(self, x):
        return {"r": x.norm(dim=-1)}


def test_own_target_class():
    target = Custom()
    assert isinstance(target, Target) and resolve_target(target) is target
    assert settle_dtype(target, points()) is target


def test_what_only_looks_like_a_target_is_refused():
    class Alike:
        dim, log_prob, constrain = DIM, Custom.log_prob, Custom.constrain

    with pytest.raises(
        TypeError, match=r"^target: expected a Target or a Pyro model, got Alike; .* inherit from Target$"
    ):
        resolve_target(Alike())
    with pytest.raises(ValueError, match="this target has no to"):
        Custom().to(torch.float32)


def test_own_target_class_is_checked_too():
    class InPlace(Custom):
        def log_prob(self, x):
            return in_place(x)

    class Unnamed(Custom):
        def constrain(self, x):
            return x

    class Short(Custom):
        def constrain(self, x):
            return {"x": x[0]}

    for cls, message in [
        (InPlace, "x changed in place"),
        (Unnamed, "constrain: expected a dict"),
        (Short, "expected 'x' to be"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_target(cls(), points())


def test_resolve_target_refuses():
    with pytest.raises(TypeError, match="args: expected none beside a target, got 1"):
        resolve_target(Custom(), torch.zeros(2))
    with pytest.raises(TypeError, match=r"got float; wrap a function as LogDensity"):
        resolve_target(3.0)


def test_functional_transforms_pass_through():
    from torch.fx.experimental.proxy_tensor import make_fx

    target, x = LogDensity(normal, dim=DIM), points()
    gradient = torch.func.vmap(torch.func.grad(lambda point: target.log_prob(point[None])[0]))(x)
    assert torch.allclose(gradient, -x)
    captured = make_fx(lambda x: target.log_prob(x))(x)
    assert torch.equal(captured(x + 1), target.log_prob(x + 1))


def test_working_dtype_and_copy():
    x = points()
    target = LogDensity(normal, dim=DIM)
    single = target.to(torch.float32)
    assert target.dtype == torch.float64 and single.dtype == torch.float32
    assert single.log_prob(x).dtype == torch.float64
    assert torch.equal(single.log_prob(x), normal(x.float()).double())
    assert target.log_prob(x.float()).dtype == torch.float32
