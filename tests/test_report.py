"""The ArviZ bridge, the summary table and the pictures, against closed forms and plain numpy."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

import vi_flows as vf
from vi_flows.inference.estimate import psis
from vi_flows.report import panels, self_test
from vi_flows.report.draws import select
from vi_flows.report.plots import PLOT_KINDS

QUICK = {"progress": False, "correct": False, "steps": 60, "particles": 64, "num_draws": 1000}
Y = torch.tensor([1.0, 2.0, 6.0])


def normals(y):
    """mu ~ N(0, 2²), z_j ~ N(0, 1), y_j ~ N(mu + z_j, 1): so mu | y ~ N(3/1.75, 1/1.75)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + z)
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


MU_MEAN, MU_VARIANCE = (9 / 2) / (1 / 4 + 3 / 2), 1 / (1 / 4 + 3 / 2)


@pytest.fixture(scope="module")
def model():
    return vf.fit(normals, Y, **QUICK)


@pytest.fixture(scope="module")
def density():
    """Standard normal within |x₀| < 2: some draws of q have weight 0."""
    inside = lambda x: torch.where(x[:, 0].abs() < 2, -0.5 * x.square().sum(-1), -torch.inf)  # noqa: E731
    return vf.fit(vf.LogDensity(inside, dim=2), **{**QUICK, "steps": 0})


@pytest.fixture(scope="module")
def without_target(model, density, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return {
        "model": vf.load(model.save(folder / "model.safetensors")),
        "density": vf.load(density.save(folder / "density.safetensors")),
    }


# --- ArviZ


def test_groups_of_a_model(model):
    data = model.to_arviz(num_draws=500)
    assert {"posterior", "sample_stats", "observed_data", "unconstrained_posterior"} == set(data.groups())
    assert {name: data.posterior[name].shape for name in data.posterior.data_vars} == {
        "mu": (1, 500),
        "scale": (1, 500),
        "z": (1, 500, 3),
        "theta": (1, 500, 3),
    }
    assert data.posterior["theta"].dims == data.posterior["z"].dims == ("chain", "draw", "schools")
    assert data.observed_data["y"].dims == ("schools",)
    assert np.array_equal(data.observed_data["y"], Y)
    names = ["mu", "scale", "z[0]", "z[1]", "z[2]"]
    assert data.unconstrained_posterior["coordinate"].values.tolist() == names
    assert (data.posterior["scale"] > 0).all()


def test_weighted_draws_are_those_of_sample_and_their_stats_are_aligned(model):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    data = model.to_arviz(num_draws=2000, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = model.sample(2000, seed=5)
    for name in ("mu", "z", "theta", "scale"):
        assert np.array_equal(data.posterior[name][0], drawn[name])
    stats, x = data.sample_stats, torch.as_tensor(data.unconstrained_posterior["x"].values[0])
    assert np.allclose(stats["lp"][0], model.target.log_prob(x))
    assert np.allclose(stats["log_weight"], stats["lp"] - stats["log_q"])
    index = torch.as_tensor(stats["proposal_draw"].values[0])
    assert np.array_equal(model.proposal.x[index], x)
    assert np.array_equal(model.proposal.log_q[index], stats["log_q"][0])
    assert np.allclose(data.posterior["scale"][0], x[:, 1].exp())


def test_equally_weighted_draws_have_the_posterior_s_moments(model):
    mu = model.to_arviz(num_draws=20_000).posterior["mu"].values
    assert mu.mean() == pytest.approx(MU_MEAN, abs=0.03)
    assert mu.var() == pytest.approx(MU_VARIANCE, rel=0.05)


def test_unweighted_draws_carry_their_log_weights(density):
    data = density.to_arviz(weighted=False)
    x, stats = torch.as_tensor(data.posterior["x"].values[0]), data.sample_stats
    assert x.shape == (1000, 2) and torch.equal(x, density.flow_draws)
    assert np.array_equal(stats["log_weight"][0], density.log_weights)
    assert np.allclose(stats["log_q"][0], density.log_prob(x))
    assert np.allclose(stats["lp"][0], density.target.log_prob(x))
    assert np.isneginf(stats["log_weight"]).sum() == (x[:, 0].abs() > 2).sum() > 0
    assert np.array_equal(density.to_arviz(num_draws=10, weighted=False).posterior["x"][0], x[:10])


def test_every_function_of_arviz_runs_on_it(model, density, without_target, tmp_path):
    kept = len(pyplot.get_fignums())
    for posterior in (model, density, *without_target.values()):
        data = posterior.to_arviz(num_draws=300)
        table = az.summary(data, round_to="none")
        assert np.isfinite(table[["mean", "sd", "ess_bulk"]].to_numpy()).all()
        for draw in (az.plot_trace, az.plot_posterior, az.plot_forest, az.plot_pair):
            draw(data)
        pyplot.close("all")
    assert kept == len(pyplot.get_fignums()) == 0


def test_attrs_survive_a_file(model, tmp_path):
    data = model.to_arviz(num_draws=100)
    data.to_netcdf(str(tmp_path / "fit.nc"))
    again = az.from_netcdf(str(tmp_path / "fit.nc"))
    assert again.posterior.equals(data.posterior) and again.sample_stats.equals(data.sample_stats)
    for attrs in (again.attrs, again.posterior.attrs):
        assert attrs["verdict"] == model.verdict.status
        assert tuple(attrs["reasons"]) == model.verdict.reasons
        assert tuple(attrs["khat_interval"]) == model.khat_interval
        for name in ("khat", "ess", "elbo", "log_evidence", "log_evidence_se"):
            assert attrs[name] == getattr(model, name)
        assert attrs["seed"] == 0 and attrs["flow"] == model.flow_description
        assert attrs["inference_library_version"] == vf.__version__


def test_dims_and_coords_as_in_arviz(model, density):
    data = model.to_arviz(num_draws=10, dims={"theta": ["town"]}, coords={"town": ["a", "b", "c"]})
    assert data.posterior["theta"].dims[-1] == "town" and data.posterior["z"].dims[-1] == "schools"
    assert data.posterior["theta"].sel(town="c").shape == (1, 10)
    assert density.to_arviz(num_draws=10, dims={"x": ["axis"]}).posterior["x"].dims == ("chain", "draw", "axis")


def test_plates_name_the_axes_that_lie_in_them():
    def nested():
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            v = pyro.sample("v", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.deterministic("total", v.sum(-1))
        with pyro.plate("draw", 2):
            pyro.sample("u", dist.Normal(0.0, 1.0))

    posterior = vf.fit(nested, **{**QUICK, "steps": 0}).to_arviz(num_draws=5).posterior
    assert posterior["v"].dims == ("chain", "draw", "rows", "columns", "v_dim_2")
    assert posterior["total"].dims == ("chain", "draw", "rows", "columns")
    assert posterior["u"].dims == ("chain", "draw", "u_dim_0")  # ArviZ has a "draw" of its own


def test_without_a_target(without_target, density):
    data = without_target["density"].to_arviz(num_draws=50)
    assert np.array_equal(data.posterior["x"], density.to_arviz(num_draws=50).posterior["x"])
    data = without_target["model"].to_arviz()
    assert data.posterior["theta"].shape == (1, 4000, 3) and "sample_stats" not in data.groups()
    with pytest.raises(ValueError, match=r"weighted: expected True, got False without a target; load it with"):
        without_target["model"].to_arviz(weighted=False)
    with pytest.raises(ValueError, match="num_draws: expected at most the 10000 stored draws"):
        without_target["model"].to_arviz(num_draws=20_000)


@pytest.mark.parametrize("n", [0, -1, 2.5, 1001])
def test_bad_counts(density, n):
    with pytest.raises(ValueError, match="num_draws: expected between 1 and the 1000 draws of q"):
        density.to_arviz(num_draws=n, weighted=False)
    if n != 1001:
        with pytest.raises(ValueError, match="num_draws: expected a positive integer"):
            density.to_arviz(num_draws=n)


def test_khat_of_known_tails():
    assert self_test() == {k: pytest.approx(k, abs=0.1) for k in (0.3, 0.7, 1.0)}


def test_a_bridge_of_the_wrong_sign_is_seen(monkeypatch):
    right = psis._psislw
    monkeypatch.setattr(psis, "_psislw", lambda log_w: right(-log_w))
    with pytest.raises(RuntimeError, match=r"arviz: expected k̂ 0.3 of weights with that tail, got .*; install"):
        self_test(repeats=2)


# --- the table


def test_summary_columns_against_numpy(model):
    table = model.summary()
    assert list(table.index) == ["mu", "scale", *(f"{v}[{i}]" for v in ("z", "theta") for i in range(3))]
    assert list(table.columns) == ["mean", "sd", "5%", "50%", "95%", "mcse_mean", "mcse_sd", "ess", "khat"]
    log_w = model.proposal.log_w.numpy()
    w = np.exp(log_w - log_w.max())
    w /= w.sum()
    mu = model.proposal.x[:, 0].numpy()
    row, mean = table.loc["mu"], w @ mu
    sd = math.sqrt(w @ (mu - mean) ** 2)
    assert row["mean"] == pytest.approx(mean) and row["sd"] == pytest.approx(sd)
    assert row["mcse_mean"] == pytest.approx(math.sqrt(w**2 @ (mu - mean) ** 2))
    # the delta method on sd = √variance
    assert row["mcse_sd"] == pytest.approx(math.sqrt(w**2 @ ((mu - mean) ** 2 - sd**2) ** 2) / (2 * sd))
    assert row["ess"] == pytest.approx((sd / row["mcse_mean"]) ** 2)
    tails = [az.psislw(log_w + power * np.log(np.abs(mu - mean)))[1] for power in (1, 2)]
    assert row["khat"] == pytest.approx(max(tails), abs=1e-6)
    assert abs(row["mean"] - MU_MEAN) < 5 * row["mcse_mean"]
    assert abs(row["sd"] - MU_VARIANCE**0.5) < 5 * row["mcse_sd"]


def test_summary_selects_and_rounds(model):
    assert list(model.summary("theta").index) == ["theta[0]", "theta[1]", "theta[2]"]
    assert list(model.summary(["theta[1]", "mu"]).index) == ["mu", "theta[1]"]
    assert list(model.summary("~theta").index) == ["mu", "scale", "z[0]", "z[1]", "z[2]"]
    assert model.summary("mu").equals(model.summary().loc[["mu"]])
    assert model.summary(round_to=2).equals(model.summary().round(2))


@pytest.mark.parametrize(
    ("var_names", "message"),
    [
        ("nu", "var_names: expected names among mu, theta, got 'nu'"),
        (["mu", "~theta"], "each with ~, to leave out"),
        (["~mu", "~theta"], "to keep at least one"),
        ([], "to keep at least one"),
    ],
)
def test_bad_names(var_names, message):
    with pytest.raises(ValueError, match=message):
        select(["mu", "theta[0]", "theta[1]"], var_names)


def test_summary_of_constants_and_without_a_target(model, without_target):
    def constant():
        pyro.sample("L", dist.LKJCholesky(2, 1.0))

    row = vf.fit(constant, **{**QUICK, "steps": 0}).summary().loc["L[0,0]"]
    assert (row["mean"], row["sd"]) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12)) and math.isnan(row["khat"])
    full = model.summary()
    stored = without_target["model"].summary().loc[full.index]
    assert stored["khat"].isna().all()
    # 10,000 resampled draws say less than the weighted ones that they come from, and do not hide it
    assert (stored["mcse_mean"] > full["mcse_mean"]).all() and (stored["ess"] < 10_000).all()
    assert (abs(stored["mean"] - full["mean"]) < 5 * stored["mcse_mean"]).all()


# --- pictures


def drawn(posterior, kind="overview", **options):
    """The figure, after a check that drawing and saving it warns of nothing and changes nothing global."""
    matplotlib.rcParams["font.size"] = 11.5
    before = (dict(matplotlib.rcParams), matplotlib.get_backend(), pyplot.get_fignums(), torch.get_rng_state().tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = posterior.plot(kind, **options)
        assert figure._repr_png_().startswith(b"\x89PNG")
    after = (dict(matplotlib.rcParams), matplotlib.get_backend(), pyplot.get_fignums(), torch.get_rng_state().tolist())
    assert before == after
    assert isinstance(figure, Figure)
    return figure


@pytest.mark.parametrize("kind", PLOT_KINDS)
def test_every_kind_of_picture(kind, model, density, without_target):
    for posterior in (model, density, *without_target.values()):
        if kind == "density" and posterior is not density:
            with pytest.raises(ValueError, match=r"kind: density expected (two coordinates|a target), got"):
                posterior.plot(kind)
            continue
        title = drawn(posterior, kind).get_suptitle()
        assert title.startswith(posterior.verdict.status) and posterior.evidence_text in title


def test_extreme_posteriors(density):
    inf = math.inf
    one = torch.full((1000,), -inf).double()
    one[3] = 2.0
    extremes = [
        {"log_weights": one, "khat": inf, "khat_interval": (math.nan, math.nan), "ess": 1.0},
        {"log_weights": torch.full((1000,), -inf).double(), "ess": math.nan, "elbo": -inf},
        {"log_weights": torch.zeros(1000).double(), "trace": [1.0]},
        {"log_weights": 200 * torch.randn(1000).double(), "trace": [-1e12, -5.0, 1.0] * 3},
        {"log_evidence": 1e300, "log_evidence_se": inf, "elbo": 1e12},
    ]
    for changes in extremes:
        drawn(dataclasses.replace(density, **changes))


def test_trace_shows_the_values_their_mean_and_what_was_judged(model):
    (ax,) = drawn(model, "trace").axes
    steps, mean, elbo, evidence = ax.get_lines()
    assert np.array_equal(steps.get_ydata(), model.trace)
    window = len(model.trace) // 4
    assert mean.get_ydata()[-1] == pytest.approx(np.mean(model.trace[-window:]))
    assert mean.get_xdata()[-1] == len(model.trace) - 1
    assert elbo.get_ydata()[0] == model.elbo and evidence.get_ydata()[0] == model.log_evidence


def test_weights_and_the_tails_fitted_to_them():
    """Weights of a known tail: points at their ranks, the fit through them, 0.7 at its own quantiles."""
    k, n = 0.2, 10_000
    log_w = torch.log(torch.as_tensor(scipy.stats.genpareto.rvs(k, loc=1, size=n, random_state=0)))
    figure = Figure()
    ax = figure.subplots()
    ax.set(xscale="log", yscale="log")
    panels._tail(ax, log_w, "C0", "w", k)
    points, fit, limit = (np.array(line.get_data()) for line in ax.get_lines())
    w = np.sort(np.exp(log_w.numpy() - np.logaddexp.reduce(log_w.numpy()) + math.log(n)))[::-1]
    assert np.allclose(points[1] * n, np.round(points[1] * n))
    assert np.allclose(points[0], w[np.round(points[1] * n).astype(int) - 1])
    m = fit.shape[1]
    assert m == 300 and np.allclose(fit[0][30:], w[30:m], rtol=0.15)
    # the limit starts where the tail does, and is a generalised Pareto quantile function
    assert limit[0, 0] == pytest.approx(w[m]) and limit[1, 0] == pytest.approx(m / n)
    standard = scipy.stats.genpareto.isf(limit[1] * n / m, 0.7)
    scale = (limit[0] - w[m])[1:] / standard[1:]
    assert np.allclose(scale, scale[0], rtol=1e-6)
    # above u, what is left of this distribution has the scale 1 + k (u − 1); its mean is 1 + 1/(1 − k)
    mean = 1 + 1 / (1 - k)
    assert scale[0] == pytest.approx((1 + k * (mean * w[m] - 1)) / mean, rel=0.15)


def test_contours_enclose_what_they_say():
    """A bent normal has the contours z₀² + z₁² = −2 log(1 − probability inside), where x = (z₀, z₀² + z₁/2)."""
    bent = vf.LogDensity(lambda x: -0.5 * x[:, 0] ** 2 - 2 * (x[:, 1] - x[:, 0] ** 2) ** 2, dim=2)
    (ax,) = drawn(vf.fit(bent, **QUICK), "density").axes
    regions = ax.collections[0]
    assert regions.levels[:3] == pytest.approx([0.01, 0.1, 0.5], rel=0.1)
    radius = math.sqrt(-2 * math.log(0.1))
    extents = regions.get_paths()[1].get_extents()
    assert extents.min == pytest.approx([-radius, -radius / 2], abs=0.1)
    assert extents.max == pytest.approx([radius, radius**2 + 1 / 16], abs=0.1)


def test_marginals_are_densities_of_both_kinds_of_draws(density):
    chosen = panels.quantities(density, "x[0]")
    x, y = panels._curve(chosen.weighted[:, 0], (-3.0, 3.0))
    truncated = scipy.stats.truncnorm(-2, 2)
    assert np.trapezoid(y, x) == pytest.approx(1.0, abs=0.01)
    assert np.abs(y - truncated.pdf(x))[np.abs(x) < 1.5].max() < 0.03
    assert (np.abs(chosen.weighted) < 2).all() and np.abs(chosen.raw).max() > 2


def test_many_quantities_are_shown_in_part_and_said():
    posterior = vf.fit(vf.LogDensity(lambda x: -0.5 * x.square().sum(-1), dim=10), **{**QUICK, "steps": 0})
    figure = drawn(posterior)
    titles = [part.get_suptitle() for part in figure.subfigs[0].subfigs + figure.subfigs[1:]]
    assert "pairs, weighted draws: 4 of 10 quantities" in titles and "marginals: 8 of 10 quantities" in titles
    assert len(drawn(posterior, "marginals", var_names="x").axes) == 12  # 10 in rows of four
    assert len(drawn(posterior, "pairs", var_names=["x[3]", "x[8]"]).axes) == 4


def test_quantities_come_from_all_variables_in_turn():
    names = ["mu", *(f"z[{i}]" for i in range(9)), "tau", *(f"b[{i},{j}]" for i in range(2) for j in range(2))]
    some = panels.Quantities(names, np.zeros((1, len(names))), None).some(6)
    assert some.names == ["mu", "z[0]", "z[1]", "tau", "b[0,0]", "b[0,1]"]


def test_far_tails_do_not_set_the_range():
    heavy = np.random.default_rng(0).standard_cauchy((20_000, 1))
    low, high = panels.Quantities(["x"], heavy, None).span(0)
    assert -60 < low < -10 and 10 < high < 60
    assert panels._span(np.full(5, 3.0))[0] < 3 < panels._span(np.full(5, 3.0))[1]


def test_single_quantity_and_odd_names():
    def odd():
        pyro.sample("a$b$_c", dist.Normal(0.0, 1.0))

    posterior = vf.fit(odd, **QUICK)
    for kind in PLOT_KINDS:
        if kind != "density":
            drawn(posterior, kind)


def test_pictures_are_written_where_asked(density, tmp_path):
    for name in ("fit.png", "deep/er/fit.svg", "fit.pdf"):
        density.plot("weights", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ValueError, match=r"kind: expected one of .*, got 'fit.png'; a file name goes in path="):
        density.plot("fit.png")
    with pytest.raises(ValueError, match="var_names: expected names among x, got 'y'"):
        density.plot(var_names="y")


def test_no_module_level_import_of_pyplot_by_the_report():
    assert not hasattr(panels, "pyplot") and "pyplot" not in vars(sys.modules["vi_flows.report.plots"])


def test_arguments_of_another_kind_are_refused(model):
    cases = [
        (lambda: model.to_arviz(num_draws=True), "num_draws: expected a positive integer"),
        (lambda: model.summary(var_names=3), "var_names: expected a name or a list"),
        (lambda: model.summary(round_to="2"), "round_to: expected a number of decimals"),
        (lambda: model.plot("trace", var_names="mu"), "var_names: expected None with kind 'trace'"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
