"""Synthetic targets are what they say, by quadrature and Stein's identity; the table is right on rows made by hand."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

import vi_flows as vf
from vi_flows.targets import PyroModel
from vi_flows.testing import Calibration, calibrate_verdict, synthetic
from vi_flows.testing.calibration import LIMITS, CalibrationRow, Rate, compare, draw_errors, known_target, measure
from vi_flows.testing.synthetic import TARGET_KINDS, Banana, FunnelBijection

PROGRAM = Path(__file__).parents[1] / "examples" / "benchmarks" / "calibration.py"
IN_ONE = [(kind, seed) for kind, (_, least) in TARGET_KINDS.items() if least == 1 for seed in range(4)]
IN_PLANE = [(kind, 10 + i) for i, kind in enumerate(TARGET_KINDS)] + [("mixture", 16), ("funnel", 14), ("funnel", 16)]


def axis(points: int, reach: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes sinh(u) for u equidistant within ±reach, and their log trapezium weights: fine inside, yet far-reaching."""
    u = torch.linspace(-reach, reach, points, dtype=torch.float64)
    return u.sinh(), u.cosh().log() + math.log(float(u[1] - u[0]))


def straightened(target, y: torch.Tensor) -> torch.Tensor:
    """log density of y = L⁻¹(x − shift) for the target's own last layer, so that one grid suits all scales."""
    layer = target.flow.layers[-1]
    x = y @ layer.scale_tril.mT + layer.shift
    return torch.cat([target.log_prob(rows) for rows in x.split(100_000)]) + layer.scale_tril.diagonal().log().sum()


def largest_gap(draws: torch.Tensor, nodes: torch.Tensor, masses: torch.Tensor) -> float:
    """Kolmogorov's distance of draws (N,) from the law with these masses of cells around the sorted nodes."""
    edges = (nodes[1:] + nodes[:-1]) / 2
    below = torch.searchsorted(draws.sort().values, edges) / len(draws)
    return float((below - masses.cumsum(0)[:-1]).abs().max())


@pytest.mark.parametrize(("kind", "seed"), IN_ONE)
def test_on_the_line_the_mass_is_one_and_draws_follow_the_density(kind, seed):
    target = synthetic(kind, seed, dim=1)
    nodes, log_weights = axis(40_001, 12.0)
    masses = (straightened(target, nodes[:, None]) + log_weights).exp()
    assert float(masses.sum()) == pytest.approx(1, abs=1e-5) and target.log_z == 0
    layer = target.flow.layers[-1]
    y = (target.draws(20_000)[:, 0] - layer.shift) / layer.scale_tril[0, 0]
    assert largest_gap(y, nodes, masses) < 1.95 / math.sqrt(20_000)  # 0.1 % by chance


@pytest.mark.parametrize(("kind", "seed"), IN_PLANE)
def test_in_the_plane_the_mass_is_one_and_draws_follow_the_density(kind, seed):
    target = synthetic(kind, seed, dim=2)
    nodes, log_weights = axis(701, 7.5)
    grid = straightened(target, torch.cartesian_prod(nodes, nodes)).reshape(len(nodes), len(nodes))
    masses = (grid + log_weights[:, None] + log_weights).exp()
    assert float(masses.sum()) == pytest.approx(1, abs=2e-3)
    layer = target.flow.layers[-1]
    y = torch.linalg.solve_triangular(layer.scale_tril, (target.draws(20_000) - layer.shift).mT, upper=False)
    for draws, marginal in zip(y, (masses.sum(1), masses.sum(0)), strict=True):
        assert largest_gap(draws, nodes, marginal) < 1.95 / math.sqrt(20_000) + 2e-3


@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_stein_identity_in_eight_dimensions(kind):
    """E[∂ᵢ log p] = 0 and E[yᵢ ∂ⱼ log p] = −δᵢⱼ for draws of p, whatever p."""
    target = synthetic(kind, 5, dim=8)
    layer = target.flow.layers[-1]
    x = target.draws(40_000).requires_grad_()
    (score,) = torch.autograd.grad(target.log_prob(x).sum(), x)
    score, x = score @ layer.scale_tril, x.detach()
    y = torch.linalg.solve_triangular(layer.scale_tril, (x - layer.shift).mT, upper=False).mT
    products = y[:, :, None] * score[:, None]
    for terms, expected in ((score, torch.zeros(8)), (products, -torch.eye(8))):
        z = (terms.mean(0) - expected) / (terms.std(0) / math.sqrt(len(x)))
        assert float(z.abs().max()) < 5


@pytest.mark.parametrize(
    "bijection", [FunnelBijection(torch.tensor([1.7]).double()), Banana(torch.tensor([0.8]).double())]
)
def test_funnel_and_banana_are_bijections(bijection):
    z = 2 * torch.randn(50, 4, dtype=torch.float64)
    x, logdet = bijection.forward_and_logdet(z)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: bijection.forward_and_logdet(z)[0]))(z)
    torch.testing.assert_close(logdet, torch.linalg.slogdet(jacobian)[1])
    back, back_logdet = bijection.inverse_and_logdet(x)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(back_logdet, -logdet)


def test_funnel_is_that_of_the_catalogue():
    x = 3 * torch.randn(20, 10, dtype=torch.float64)
    z, logdet = FunnelBijection(torch.tensor([3.0]).double()).inverse_and_logdet(x)
    torch.testing.assert_close(vf.bases.StandardNormal(10).log_prob(z) + logdet, vf.catalogue.funnel().log_prob(x))


def test_targets_depend_on_kind_and_seed_alone():
    state, target = torch.get_rng_state(), synthetic("mixture", 7)
    torch.manual_seed(99)
    again, other = synthetic("mixture", 7), synthetic("mixture", 8)
    assert (again.how, again.dim) == (target.how, target.dim) and other.how != target.how
    torch.testing.assert_close(again.draws(10), target.draws(10), rtol=0, atol=0)
    torch.set_rng_state(state)
    synthetic("student", 3).draws(10)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in target.flow.parameters()) and target.flow.dtype == torch.float64


def test_dimensions_and_scales_vary():
    targets = [synthetic(kind, seed) for kind in TARGET_KINDS for seed in range(30)]
    dims = [target.dim for target in targets]
    assert min(dims) == 1 and max(dims) >= 18 and len(set(dims)) >= 12
    assert all(target.dim >= 2 for target in targets if target.kind in ("funnel", "banana"))
    scales = torch.cat([target.flow.layers[-1].scale_tril.diagonal() for target in targets])
    assert 1e-3 <= float(scales.min()) < 2e-3 and 500 < float(scales.max()) <= 1e3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: synthetic("cauchy", 0), "kind: expected one of normal"),
        (lambda: synthetic("funnel", 0, dim=1), "dim: expected an integer of at least 2"),
        (lambda: calibrate_verdict(0), "n: expected a positive integer, got 0"),
        (lambda: calibrate_verdict(1, kinds=["normal", "cauchy"]), "kinds: expected some of normal"),
    ],
)
def test_mistakes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_errors_of_shifted_draws_are_those_of_the_normal_distribution():
    exact, shift = torch.randn(200_000, 2, dtype=torch.float64) * torch.tensor([1.0, 5.0]), 0.2
    x = torch.randn(400_000, 2, dtype=torch.float64) * torch.tensor([1.0, 5.0]) + torch.tensor([0.0, 5 * shift])
    found, normal = draw_errors(x, exact), torch.distributions.Normal(0.0, 1.0)
    assert found["mean"] == pytest.approx(shift / LIMITS["mean"], abs=0.1)
    for name, p in (("P5", 0.05), ("P50", 0.5), ("P95", 0.95)):
        below = float(normal.cdf(normal.icdf(torch.tensor(p)) - shift))
        assert found[name] == pytest.approx((p - below) / LIMITS[name], abs=0.15)
    assert math.isinf(draw_errors(x * math.nan, exact)["mean"])


def row(kind="normal", status="reliable", wrong=0.5, own=0.5, failed=(), stopped_by=(), seed=0):
    errors = {name: 0.1 for name in LIMITS}
    own_errors = {name: 0.1 for name in list(LIMITS)[1:]} | {"P50": own}
    return CalibrationRow(
        kind,
        seed,
        1,
        "",
        status,
        2.0,
        list(failed),
        list(stopped_by),
        {},
        {} if status == "error" else errors | {"mean": wrong},
        own_errors,
    )


ROWS = [
    row(),
    row(own=1.5),
    row(wrong=3.0),
    row(status="corrected", failed=["divergence"]),
    row("funnel", "corrected", wrong=1.01, failed=["own draws"]),
    row("funnel", "unreliable", failed=["tails", "own draws"], stopped_by=["tails"]),
    row("funnel", "unreliable", failed=["tails", "precision"], stopped_by=["tails", "precision"]),
    row("funnel", "unreliable", wrong=math.inf, failed=["tails"], stopped_by=["tails"]),
    row("funnel", "error"),
]


def test_table_of_rows_made_by_hand():
    found = Calibration(ROWS)
    assert found.false_claims == [ROWS[2], ROWS[4]] and found.false_alarms == [ROWS[5], ROWS[6]]
    assert found.false_of_claims == Rate(2, 5) and found.false_of_fits == Rate(2, 9)
    assert found.false_alarm_rate == Rate(2, 5) and found.false_reliable == Rate(1, 3)
    lines = found.table().splitlines()
    assert lines[1].split() == ["normal", "2/1", "1/0", "0/0", "0", "8"]
    assert lines[2].split() == ["funnel", "0/0", "0/1", "2/1", "1", "10"]
    assert lines[3].split() == ["all", "2/1", "1/1", "2/1", "1", "18"]
    assert "false claims / claims: 2 of 5, 40.0% (" in found.table()
    assert lines[-1] == "false alarms by failing check: tails 2, precision 1"


def test_nothing_wrong_and_nothing_at_all():
    assert Calibration([row()]).table().splitlines()[-1] == "false alarms by failing check: none"
    assert Calibration([]).false_of_claims.interval == (0.0, 1.0)


@pytest.mark.parametrize(("count", "total"), [(0, 26), (3, 40), (40, 40)])
def test_interval_is_that_of_clopper_and_pearson(count, total):
    """At the bounds the binomial tail that contains the count holds 2.5 %."""

    def tail(p, counts):
        return sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in counts)

    low, high = Rate(count, total).interval
    assert low == 0 if count == 0 else tail(low, range(count, total + 1)) == pytest.approx(0.025, rel=1e-6)
    assert high == 1 if count == total else tail(high, range(count + 1)) == pytest.approx(0.025, rel=1e-6)


def test_a_fit_that_raises_is_a_row():
    target = synthetic("normal", 0, dim=1)
    target.fn = lambda x: x[:, 0] * math.nan
    found = measure(target)
    assert found.status == "error" and not found.right and not found.claimed and found.message.startswith("ValueError")


def test_end_to_end():
    """Two fits of normals are right; beside another truth they are wrong; rows that are kept are not measured again."""
    seen = []
    found = calibrate_verdict(2, 4, kinds=["normal"], report=seen.append)
    assert found.rows == seen and [r.seed for r in seen] == [4, 5]
    assert all(r.claimed and r.right and not r.failed and r.cpu_seconds > 0 for r in seen)
    assert abs(seen[0].log_z_error) < 0.01 and seen[0].checks and max(seen[0].checks.values()) < 1
    assert calibrate_verdict(2, 4, kinds=["normal"], kept=seen).rows == seen
    target = synthetic("normal", 4)
    described = {"kind": "normal", "seed": 4, "dim": target.dim, "target": target.how}
    posterior = vf.fit(target, seed=4, progress=False)
    assert compare(posterior, target, described, 0.0).wrong == []
    draw = target.draw
    target.draw = lambda n, generator: (x := draw(n, generator)) + 0.3 * x.std(0)
    assert compare(posterior, target, described, 0.0).wrong == ["mean", "P5", "P50", "P95"]
    target.draw, posterior.log_evidence = draw, -0.2
    assert compare(posterior, target, described, 0.0).wrong == ["log Z"]


@pytest.mark.parametrize("seed", range(6))
def test_hierarchies_are_what_they_say(seed):
    """Draws have E[∇log p] = 0; density and Pyro model differ by the evidence."""
    target = known_target("neck", seed)
    model = PyroModel(target.model)
    x = target.draws(50_000, seed)
    assert torch.allclose(model.log_prob(x[:50]), target.log_prob(x[:50]) + target.log_evidence, atol=1e-8)
    assert torch.allclose(target.points(model.constrain(x[:50])), x[:50], atol=1e-12)
    leaf = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(target.log_prob(leaf).sum(), leaf)
    assert ((score.mean(0) / score.std(0)).abs() * math.sqrt(len(x)) < 5).all()


def test_a_hierarchy_s_evidence_is_its_integral():
    """Importance sampling of (μ, log τ) with θ integrated out by hand gives log Z = 0 of the density."""
    target = known_target("neck", 1)
    x = target.draws(4000, 0)[:, :2]
    q = torch.distributions.MultivariateNormal(x.mean(0), 2 * x.mT.cov())
    torch.manual_seed(0)
    at = q.sample((200_000,))
    variance = at[:, 1:].exp().square() + target.noise.square()
    log_y = torch.distributions.Normal(at[:, :1], variance.sqrt()).log_prob(target.y).sum(-1)
    prior = (
        torch.distributions.Normal(0.0, 5.0).log_prob(at[:, 0]) + target.scale_prior.log_prob(at[:, 1].exp()) + at[:, 1]
    )
    log_w = log_y + prior - q.log_prob(at)
    assert abs(float(log_w.logsumexp(0)) - math.log(len(at)) - target.log_evidence) < 0.02


def test_program_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    monkeypatch.syspath_prepend(str(PROGRAM.parent))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr().out

    chosen = ("--n", "1", "--seed", "10", "--only", "norm", "--json", str(out))
    assert "false claims / claims: 0 of 1" in run(*chosen)
    (row,) = json.loads(out.read_text(encoding="utf-8"))
    changed = row | {"status": "corrected", "errors": row["errors"] | {"mean": "inf"}, "khat": None}
    out.write_text(json.dumps([changed]), encoding="utf-8")
    again = run(*chosen)
    assert "FALSE CLAIM" in again and "mean inf" in again and "false claims / claims: 1 of 1" in again
    assert json.loads(out.read_text(encoding="utf-8")) == [changed]
    with pytest.raises(SystemExit, match="2"):
        run("--only", "cauchy")
    assert "--only: expected part of one of normal" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [pytest.param("neck", marks=pytest.mark.slow), "neck_model"])
def test_a_hierarchy_is_measured(kind):
    row = measure(known_target(kind, 5))
    assert row.status in ("reliable", "corrected") and row.right, row
