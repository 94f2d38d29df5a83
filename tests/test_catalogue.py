"""Densities with known answers: log Z by quadrature or exact draws, draws against moments, derivatives far out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import vi_flows as vf
from vi_flows import catalogue

IN_PLANE = {"u1": (5, 5), "u2": (14, 8), "u3": (14, 8), "u4": (14, 8), "rings": (4, 4)}
WITHOUT_DATA = [name for name in catalogue.names() if not catalogue.needs_data(name)]
POINTS = 20_000
BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data files laid out like German credit and ionosphere, of made numbers."""
    path, made = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    table = np.column_stack([made.integers(0, 5, (60, 24)), made.integers(1, 3, 60)])
    np.savetxt(path / "german.data-numeric", table, fmt="%4d")
    x = made.normal(2.0, 3.0, (50, 34))
    x[:, 1] = 0.0  # a constant column, as the real one has
    np.savez(path / "ionosphere.npz", X=x, y=made.integers(0, 2, 50).astype(np.int8))
    return path


def every(folder):
    return [catalogue.get(name, folder if catalogue.needs_data(name) else None) for name in catalogue.names()]


def grid(half_x: float, half_y: float, points: int = 1501) -> tuple[torch.Tensor, float]:
    """Points of a grid over (−half_x, half_x) × (−half_y, half_y), and log of the area of a cell."""
    x, y = (torch.linspace(-half, half, points, dtype=torch.float64) for half in (half_x, half_y))
    return torch.cartesian_prod(x, y), math.log(float((x[1] - x[0]) * (y[1] - y[0])))


@pytest.mark.parametrize("name", IN_PLANE)
def test_log_z_in_the_plane_is_that_of_a_grid(name):
    density = catalogue.get(name)
    points, log_cell = grid(*IN_PLANE[name])
    log_p = torch.cat([density.log_prob(rows) for rows in points.split(100_000)])
    assert float(log_p.logsumexp(0)) + log_cell == pytest.approx(density.log_z, abs=2e-6)


def test_definitions_at_a_point():
    """u1 to u4 and rings written out with scalars."""
    a, b = 0.7, -1.2
    r, w1 = math.hypot(a, b), math.sin(math.pi * a / 2)
    w2, w3 = 3 * math.exp(-0.5 * ((a - 1) / 0.6) ** 2), 3 / (1 + math.exp(-(a - 1) / 0.3))

    def bump(x, sd):
        return math.exp(-0.5 * (x / sd) ** 2)

    quartic = -0.5 * (a / 4) ** 4
    expected = {
        "u1": -0.5 * ((r - 2) / 0.4) ** 2 + math.log(bump(a - 2, 0.6) + bump(a + 2, 0.6)),
        "u2": -0.5 * ((b - w1) / 0.4) ** 2 + quartic,
        "u3": math.log(bump(b - w1, 0.35) + bump(b - w1 + w2, 0.35)) + quartic,
        "u4": math.log(bump(b - w1, 0.4) + bump(b - w1 + w3, 0.35)) + quartic,
        "rings": math.log(math.exp(-0.5 * (8 * (r - 1)) ** 2) + math.exp(-0.5 * (8 * (r - 2)) ** 2)),
    }
    point = torch.tensor([[a, b]], dtype=torch.float64)
    for name, value in expected.items():
        assert float(catalogue.get(name).log_prob(point)) == pytest.approx(value, rel=1e-12)


def test_normalised_densities_are_products_of_torch_distributions():
    normal = torch.distributions.Normal
    x = 2 * torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v, others = x[:, 0], x[:, 1:]
    funnel = normal(0, 3).log_prob(v) + normal(0, (v / 2).exp().unsqueeze(-1)).log_prob(others).sum(-1)
    torch.testing.assert_close(catalogue.funnel(5).log_prob(x), funnel)
    banana = normal(0, 3).log_prob(v) + normal((v**2 - 9) / 3, 1).log_prob(x[:, 1])
    torch.testing.assert_close(catalogue.banana(5).log_prob(x), banana + normal(0, 1).log_prob(x[:, 2:]).sum(-1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        means = (torch.rand(40, 2) - 0.5) * 80
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(40, dtype=torch.float64)),
        torch.distributions.Independent(normal(means.double(), math.log(1 + math.e)), 1),
    )
    z = 40 * x[:, :2]
    torch.testing.assert_close(catalogue.gmm40().log_prob(z), mixture.log_prob(z))


def test_manywell_factorises():
    d = torch.linspace(-5, 5, 200_001, dtype=torch.float64)
    well = -(d**4) + 6 * d**2 + 0.5 * d
    one = float(well.logsumexp(0)) + math.log(10 / 200_000) + 0.5 * math.log(2 * math.pi)
    for dim in (2, 8):
        assert catalogue.manywell(dim).log_z == pytest.approx(dim / 2 * one, abs=1e-9)
    x = torch.tensor([[0.3, 1.0, -1.5, 0.2]], dtype=torch.float64)
    expected = sum(-(a**4) + 6 * a**2 + a / 2 - b**2 / 2 for a, b in ((0.3, 1.0), (-1.5, 0.2)))
    assert float(catalogue.manywell(4).log_prob(x)) == pytest.approx(expected)
    minor = float(well.softmax(0)[d < 0].sum())
    shares = catalogue.manywell(4).mode_shares(catalogue.manywell(4).draws(POINTS))
    expected = torch.tensor([minor**2, minor * (1 - minor), minor * (1 - minor), (1 - minor) ** 2])
    torch.testing.assert_close(shares, expected, atol=5 * (0.25 / POINTS) ** 0.5, rtol=0)


def brownian_covariance(s: float, sigma: float) -> np.ndarray:
    """Of (x₁..x₃₀, y): y = x + noise at the times seen."""
    t = np.arange(1, 31)
    full = s**2 * np.minimum.outer(t, t)
    seen = np.r_[0:10, 20:30]
    return np.block([[full, full[:, seen]], [full[seen], full[np.ix_(seen, seen)] + sigma**2 * np.eye(20)]])


def test_brownian_is_the_joint_normal_of_path_and_data():
    """Given the scales, (x, y) is normal, and y's own density integrated over the scales is Z."""
    y = np.array(catalogue.BROWNIAN_OBSERVED)
    made = np.random.default_rng(1)
    density = catalogue.brownian()

    def normal(value: np.ndarray, covariance: np.ndarray) -> float:
        tril = np.linalg.cholesky(covariance)
        standard = np.linalg.solve(tril, value)
        return -0.5 * standard @ standard - np.log(tril.diagonal()).sum() - 0.5 * len(value) * math.log(2 * math.pi)

    def prior(scales: np.ndarray) -> float:
        return normal(scales, 4 * np.eye(2))

    for scales in ([0.3, -0.4], [-2.0, -3.0]):
        path = made.normal(size=30)
        joint = normal(np.concatenate([path, y]), brownian_covariance(*np.exp(scales))) + prior(np.array(scales))
        x = torch.tensor([[*scales, *path]], dtype=torch.float64)
        assert float(density.log_prob(x)) == pytest.approx(joint, rel=1e-9)
    axis = np.linspace(-11, 7, 91)
    log_z = [
        prior(np.array([a, b])) + normal(y, brownian_covariance(np.exp(a), np.exp(b))[30:, 30:])
        for a in axis
        for b in axis
    ]
    log_z = np.logaddexp.reduce(log_z) + 2 * math.log(axis[1] - axis[0])
    assert log_z == pytest.approx(density.log_z, abs=1e-4)


def test_brownian_draws_of_the_path_have_the_moments_of_conditioning():
    """E[x | y] and its variance, the scales integrated out by the draws themselves."""
    x = catalogue.brownian().draws(POINTS).numpy()
    y, means, variances = np.array(catalogue.BROWNIAN_OBSERVED), [], []
    for a, b in x[:300, :2]:
        c = brownian_covariance(np.exp(a), np.exp(b))
        gain = c[:30, 30:] @ np.linalg.inv(c[30:, 30:])
        means.append(gain @ y)
        variances.append((c[:30, :30] - gain @ c[30:, :30]).diagonal())
    path, expected = x[:, 2:], np.mean(means, 0)
    sd = np.sqrt(np.mean(variances, 0) + np.var(means, 0))
    assert np.abs(path.mean(0) - expected).max() < 0.05 * sd.max()
    assert np.abs(path.std(0) / sd - 1).max() < 0.1


@pytest.mark.parametrize("name", sorted(set(WITHOUT_DATA) - {"funnel", "banana"}))
def test_draws_have_the_density(name):
    """E_p[q(x)/p(x)] = 1 for a density q that p covers, with p = exp(log_prob − log_z): wrong draws or log Z show.

    q is normal with the mean and half the covariance of half the draws; the other half is averaged over.
    """
    density = catalogue.get(name)
    fitted, x = density.draws(2 * POINTS, seed=3).split(POINTS)
    centre = fitted[: POINTS // 2]
    if density.modes > 1:
        centre = centre[density.mode_of(centre) == density.modes - 1]
    q = torch.distributions.MultivariateNormal(centre.mean(0), torch.cov(centre.mT) / 2)
    ratio = (q.log_prob(x) - density.log_prob(x) + density.log_z).exp()
    assert float(ratio.mean()) == pytest.approx(1, abs=5 * float(ratio.std()) / POINTS**0.5 + 1e-9)
    assert float(ratio.std()) / POINTS**0.5 < 0.1, "else the check says nothing"
    assert torch.equal(density.draws(10, seed=3), density.draws(10, seed=3))
    assert not torch.equal(density.draws(10, seed=3), density.draws(10, seed=4))


def test_draws_of_funnel_and_banana_are_normals_when_straightened():
    x = catalogue.funnel(4).draws(POINTS)
    funnel = torch.cat([x[:, :1] / 3, x[:, 1:] * (-x[:, :1] / 2).exp()], 1)
    x = catalogue.banana(4).draws(POINTS)
    banana = torch.cat([x[:, :1] / 3, x[:, 1:2] - (x[:, :1] ** 2 - 9) / 3, x[:, 2:]], 1)
    chance = 5 / POINTS**0.5
    for normal in (funnel, banana):
        assert float(normal.mean(0).abs().max()) < chance
        assert float((torch.cov(normal.mT) - torch.eye(4)).abs().max()) < 2 * chance
        assert float((normal.abs() < 0.6745).double().mean(0).sub(0.5).abs().max()) < chance


def test_modes():
    gmm = catalogue.gmm40()
    draws = gmm.draws(POINTS)
    shares = gmm.mode_shares(draws)
    assert len(shares) == gmm.modes == 40 and float((shares - 1 / 40).abs().max()) < 0.006
    assert float(gmm.mode_shares(draws[:1]).sum()) == 1
    z = torch.tensor([[0.9, 0.1], [0.0, -2.1], [-1.6, 0.0]], dtype=torch.float64)
    assert catalogue.rings().mode_of(z).tolist() == [0, 1, 1]
    assert catalogue.u1().mode_of(z - 0.01).tolist() == [1, 0, 0]
    assert catalogue.manywell(4).mode_of(torch.tensor([[1.0, 0, -1, 0], [-1, 0, 1, 0]])).tolist() == [1, 2]
    on_the_second_wave = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 3.0]], dtype=torch.float64)
    assert catalogue.u3().mode_of(on_the_second_wave).tolist() == [0, 1]
    assert catalogue.funnel(3).mode_shares(torch.zeros(4, 3)).tolist() == [1]


def test_log_density_and_its_derivatives_are_finite_and_correct_near_and_far(folder):
    generator = torch.Generator().manual_seed(0)
    for density in every(folder):
        for scale in (0.0, 1.0, 100.0, 1e6):
            x = scale * torch.randn(20, density.dim, dtype=torch.float64, generator=generator)
            x.requires_grad_()
            value = density.log_prob(x)
            (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(gradient.sum(), x)
            for tensor in (value, gradient, second):
                assert bool(tensor.isfinite().all()), (density.dim, scale)
        vf.testing.check_target(density, torch.randn(32, density.dim, dtype=torch.float64, generator=generator))


def test_vmap_and_fx_see_the_same_function(folder):
    def function(density):
        return lambda rows: density.fn(rows)  # of one argument, as tracing wants it

    for density in every(folder):
        fn = function(density)
        x = torch.randn(6, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(torch.func.vmap(fn)(x.unsqueeze(1)).squeeze(1), fn(x))
        torch.testing.assert_close(make_fx(fn)(torch.zeros_like(x))(x), fn(x))


def test_logistic_regression_is_bernoulli_times_normal(folder):
    made = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, dtype=torch.float64, generator=made)
    y = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1])
    beta = torch.randn(4, 3, dtype=torch.float64, generator=made)
    bernoulli = torch.distributions.Bernoulli(logits=beta @ x.mT).log_prob(y.double()).sum(-1)
    prior = torch.distributions.Normal(0.0, 2.0).log_prob(beta).sum(-1)
    torch.testing.assert_close(catalogue.logistic_regression(x, y, 2.0).log_prob(beta), bernoulli + prior)


def test_data_are_scaled_as_said(folder):
    table = np.loadtxt(folder / "german.data-numeric")
    x, y = table[:, :24], table[:, 24] - 1
    beta = np.linspace(-0.5, 0.5, 25)
    logits = beta[0] + (x / x.std(0)) @ beta[1:]
    log_p = (y * logits - np.logaddexp(0, logits)).sum() - 0.5 * beta @ beta / 100 - 12.5 * math.log(200 * math.pi)
    density = catalogue.credit(folder)
    assert float(density.log_prob(torch.from_numpy(beta)[None])) == pytest.approx(log_p)
    with np.load(folder / "ionosphere.npz") as file:
        x, y = file["X"], file["y"]
    beta, sd = np.linspace(-0.5, 0.5, 35), np.where(x.std(0) > 0, x.std(0), 1)
    logits = beta[0] + ((x - x.mean(0)) / sd) @ beta[1:]
    log_p = (y * logits - np.logaddexp(0, logits)).sum() - 0.5 * beta @ beta - 17.5 * math.log(2 * math.pi)
    assert float(catalogue.ionosphere(folder).log_prob(torch.from_numpy(beta)[None])) == pytest.approx(log_p)


def test_by_name():
    assert set(WITHOUT_DATA) == set(catalogue.names()) - {"credit", "ionosphere"}
    for name in catalogue.names():
        assert "\n" not in catalogue.summary(name) and len(catalogue.summary(name)) > 20
    assert catalogue.get("manywell8").dim == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: catalogue.get("funel"), "name: expected one of u1, .*got 'funel'"),
        (lambda: catalogue.get("credit"), "data: expected a folder for 'credit', got none"),
        (lambda: catalogue.get("credit", "nowhere"), "data: expected a folder with german.data-numeric, got nowhere"),
        (lambda: catalogue.get("u1", "nowhere"), "data: expected none for 'u1', got nowhere"),
        (lambda: catalogue.funnel(1), "dim: expected an integer of at least 2, got 1"),
        (lambda: catalogue.manywell(3), "dim: expected an even number, got 3"),
        (lambda: catalogue.logistic_regression(torch.ones(3, 2), torch.tensor([0, 1, 2]), 1.0), "y: expected 0 or 1"),
        (lambda: catalogue.logistic_regression(torch.ones(3, 2), torch.ones(2), 1.0), "x, y: expected shapes"),
        (lambda: catalogue.logistic_regression(torch.ones(3, 2), torch.ones(3), 0.0), "prior_sd: expected a positive"),
        (lambda: catalogue.logistic_regression(torch.ones(3, 2), torch.ones(3), 1.0).draws(3), "draws: expected"),
    ],
)
def test_mistakes_end_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture
def energies(monkeypatch):
    """examples/benchmarks/energies.py as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import energies

    return energies


def test_benchmark_measures_a_fit(energies, monkeypatch):
    scale = torch.tensor([1.0, 10.0], dtype=torch.float64)
    density = catalogue.KnownDensity(
        lambda x: -0.5 * (x / scale).square().sum(-1),
        2,
        log_z=math.log(2 * math.pi * 10),
        draw=lambda n, generator: scale * torch.randn(n, 2, dtype=torch.float64, generator=generator),
    )
    posterior = vf.fit(density, seed=0, progress=False, num_draws=1000)
    monkeypatch.setattr(vf, "fit", lambda *_, **__: posterior)
    row = energies.measure("made", density, density.draws(50_000), 0)
    assert row["status"] == "reliable" and not row["wrong"] and not row["false_claim"] and not row["bug"]
    assert abs(row["gap"]) < 0.01 and abs(row["log_z_error"]) < 0.01 and row["after"]["modes_found"] == 1
    assert "right" in energies.line(row) and "1 claimed; 0 false claims" in energies.totals([row])
    density.log_z -= 1
    wrong = energies.measure("made", density, density.draws(50_000) + 3 * scale, 0)
    assert wrong["wrong"] == ["log Z", "mean", "P5", "P50", "P95"] and wrong["false_claim"] and wrong["bug"]
    assert "FALSE CLAIM; BUG" in energies.line(wrong)
    monkeypatch.setattr(vf, "fit", lambda *_, **__: 1 / 0)
    failed = energies.measure("made", density, None, 0)
    assert "error: ZeroDivisionError" in energies.line(failed) and "1 errors" in energies.totals([failed])


def test_benchmark_counts_modes(energies):
    gmm = catalogue.gmm40()
    exact = gmm.draws(50_000)
    all_modes = energies.compare(gmm.draws(20_000, seed=1), exact, gmm)
    assert all_modes["modes_found"] == all_modes["modes"] == 40 and all_modes["mode_mass_error"] < 0.01
    assert all_modes["mode_entropy"] == pytest.approx(1, abs=0.01) and all_modes["mean"] < 0.03
    one = energies.compare(exact[gmm.mode_of(exact) == 7], exact, gmm)
    assert one["modes_found"] == 1 and one["mode_entropy"] == 0 and one["mode_mass_error"] > 0.9


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "energies.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_benchmark_keeps_rows_that_are_there(energies, tmp_path):
    out = tmp_path / "rows.json"
    draws = {"modes_found": 1, "modes": 1, "mode_mass_error": 0.0, "mean": 0.01, "probabilities": [0.001] * 3}
    row = {"name": "u2", "dim": 2, "seed": 0, "cpu_seconds": 12345.0, "status": "unreliable", "khat": 0.1}
    row |= {"khat_spread": 0.1, "ess": 0.9, "gap": 0.01, "log_z_error": 0.0, "log_z_se": 0.001, "wrong": []}
    row |= {"false_claim": False, "unclaimed": True, "bug": False, "before": draws, "after": draws}
    other = {**row, "name": "u1"}
    out.write_text(json.dumps([other, row]))
    done = run_benchmark("--only", "u2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "12345.0 unreliable" in done.stdout and "1 fits: 0 claimed; 0 false claims; 1 right" in done.stdout
    assert json.loads(out.read_text()) == [row, other]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only: expected part of one of u1"),
        (["--data", "nowhere"], "--data: expected a folder"),
    ],
)
def test_benchmark_refuses_in_one_line(arguments, message):
    done = run_benchmark(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
