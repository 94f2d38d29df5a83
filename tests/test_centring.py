"""Centring and necks: coordinates of hierarchies against the model as written, and draws whose neck is missing."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import vi_flows as vf
from vi_flows.inference.estimate.weights import Weights, mean_elbo
from vi_flows.inference.judge.necks import funnels, necks
from vi_flows.inference.locate.centring import choose_centring, learned
from vi_flows.inference.locate.gaussian import Gaussians, Kind, Origin
from vi_flows.inference.scoring import as_flow
from vi_flows.targets import LogDensity, PyroModel
from vi_flows.testing.calibration import draw_errors, known_target
from vi_flows.testing.hierarchies import Hierarchy

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y, sigma):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def families():
    """Every kind of frame, in plates and events, nested: the scale of one is the location of another."""
    m, s = pyro.sample("m", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.HalfNormal(1.0))
    pyro.sample("log_normal", dist.LogNormal(m * torch.ones(2), s).to_event(1))
    pyro.sample("student", dist.StudentT(4.0, m, s).expand([2]).to_event(1))
    pyro.sample("laplace", dist.Laplace(m, s))
    pyro.sample("cauchy", dist.Cauchy(m, s))
    pyro.sample("gumbel", dist.Gumbel(m, s))
    lam = pyro.sample("half_cauchy", dist.HalfCauchy(s).expand([2]).to_event(1))
    pyro.sample("gamma", dist.Gamma(2.0, s))
    pyro.sample("inverse_gamma", dist.InverseGamma(2.0, s))
    pyro.sample("exponential", dist.Exponential(s))
    with pyro.plate("n", 2):
        pyro.sample("normal", dist.Normal(m, s * lam))


def slopes(y):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
    with pyro.plate("groups", 3):
        b = pyro.sample("b", dist.MultivariateNormal(loc, scale_tril=scale[:, None] * corr))
        pyro.sample("t", dist.MultivariateStudentT(torch.tensor(5.0), loc, scale[:, None] * corr))
        pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=y)


def walk(y):
    scale, x = pyro.sample("scale", dist.HalfNormal(1.0)), 0.0
    for t in range(len(y)):
        x = pyro.sample(f"x{t}", dist.Normal(x, scale))
        pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=y[t])


MODELS = {
    "schools": lambda: PyroModel(schools, Y, SIGMA),
    "families": lambda: PyroModel(families),
    "slopes": lambda: PyroModel(slopes, torch.randn(3)),
    "walk": lambda: PyroModel(walk, torch.randn(4)),
}


def degrees(target: PyroModel, c: float) -> dict[str, float]:
    return {name: round(c) if target.is_matrix(name) else c for name in target.centrable}


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_other_coordinates_have_the_same_law(name, c):
    """log p over other coordinates is log p of the model as written plus the log-determinant, by autograd, of the map
    between them; values go there and back, and translate says the same as going by way of values."""
    torch.manual_seed(0)
    target = MODELS[name]()
    other = target.recentred(degrees(target, c))
    assert other.centrable == target.centrable and other.mode == "vmap"
    x = 0.5 * torch.randn(5, target.dim, dtype=torch.float64)
    values = other.constrain(x)
    written = target.unconstrain(values)
    assert torch.allclose(other.unconstrain(values), x, atol=1e-10)
    assert torch.allclose(other.translate(x, target), written, atol=1e-10)
    assert torch.allclose(target.translate(written, other), x, atol=1e-10)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda row: other.translate(row[None], target)[0], x[i])
        difference = other.log_prob(x[i : i + 1]) - target.log_prob(written[i : i + 1])
        assert float(difference) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-9)
    assert other.prior(2).shape == (2, target.dim)


def test_modes_of_evaluation_agree():
    target = PyroModel(schools, Y, SIGMA).recentred({"theta": 0.4})
    x = torch.randn(6, target.dim, dtype=torch.float64)
    expected, values = target.log_prob(x), target.constrain(x)
    for target.mode in ("plate", "loop"):
        target.forget()
        assert torch.allclose(target.log_prob(x), expected, atol=1e-9)
    target.mode = "loop"
    assert all(torch.allclose(target.constrain(x)[name], value) for name, value in values.items())
    assert torch.allclose(target.unconstrain(values), x, atol=1e-9)


@pytest.mark.parametrize("c", [0.0, 0.2])
def test_nothing_cancels_in_the_neck(c):
    """At log τ = −200 values equal their location to the last bit, and the density still sees the coordinates."""
    target = PyroModel(schools, Y, SIGMA).recentred({"theta": c})
    x = torch.full((1, 10), 0.5, dtype=torch.float64)
    x[:, 1] = -200.0
    z = x[0, 2:] if c == 0 else (x[0, 2:] - c * 0.5) * math.exp(200 * c)
    expected = -0.5 * float(z.square().sum()) + 8 * c * 200.0
    y = dist.Normal(0.5, SIGMA.double()).log_prob(Y.double()).sum()
    prior = dist.Normal(0.0, 5.0).log_prob(torch.tensor(0.5)) + math.log(2 / (math.pi * 5)) - 200.0
    expected += float(y) + float(prior) - 4 * math.log(2 * math.pi)
    assert float(target.log_prob(x)) == pytest.approx(expected, rel=1e-6)


def test_powers_of_densities_are_left_as_written():
    """Under poutine.scale a site's density is raised to a power, to which another frame would add log s."""

    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.poutine.scale(scale=2.0):
            theta = pyro.sample("theta", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(theta, scale)), 1.0), obs=torch.tensor(0.3))

    assert PyroModel(model).centrable == ["z"]


def test_what_is_no_degree_is_refused():
    target = PyroModel(schools, Y, SIGMA)
    with pytest.raises(
        ValueError, match=r"reparam\['mu'\]: expected a site whose location or scale is latent \(theta\)"
    ):
        target.recentred({"mu": 0.0})
    with pytest.raises(ValueError, match=r"reparam\['theta'\]: expected degrees of centring in \[0, 1\]"):
        target.recentred({"theta": 1.5})
    with pytest.raises(ValueError, match=r"reparam\['theta'\]: expected degrees of centring in .*, got 'yes'"):
        target.recentred({"theta": "yes"})
    with pytest.raises(ValueError, match=r"one or of shape \(8,\)"):
        target.recentred({"theta": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"reparam\['b'\]: expected 0 or 1, for its scale is a matrix"):
        PyroModel(slopes, torch.zeros(3)).recentred({"b": 0.5})
    with pytest.raises(ValueError, match="reparam: expected True or False for a density"):
        vf.fit(LogDensity(lambda x: -x.square().sum(-1), dim=2), reparam={"x": 0.0}, progress=False)
    with pytest.raises(ValueError, match="reparam: expected True, False or degrees"):
        vf.fit(schools, Y, SIGMA, reparam="yes", progress=False)


def test_learned_degrees_are_the_share_of_the_data():
    """With a known scale τ and normal data of precision I the degree is Iτ²/(1 + Iτ²)."""

    def model(y, noise):
        tau = pyro.sample("tau", dist.LogNormal(math.log(0.7), 0.001))
        with pyro.plate("groups", 4):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, noise), obs=y)

    torch.manual_seed(0)
    noise = torch.tensor([0.1, 0.5, 1.0, 5.0], dtype=torch.float64)
    apart = PyroModel(model, torch.ones(4), noise).recentred({"theta": 0.0})
    precision = torch.cat([torch.tensor([1e6]).double(), 1 + 0.49 / noise.square()])
    gaussian = Gaussians(torch.zeros(1, 5).double(), precision.rsqrt().diag()[None], (Origin(Kind.END),))
    found = learned(apart, gaussian)["theta"]
    assert torch.allclose(found, 0.49 / (0.49 + noise.square()), atol=0.1)  # prior variances are those of 400 draws


@pytest.mark.parametrize(("noise", "low", "high"), [(0.05, 0.8, 1.0), (5.0, 0.0, 0.3)])
def test_data_that_say_much_are_centred(noise, low, high):
    torch.manual_seed(0)
    y = torch.randn(20) + noise * torch.randn(20)
    target, near, sentence = choose_centring(PyroModel(schools, y, torch.full((20,), noise)), None)
    assert near.shape == (1, target.dim) and sentence.startswith("centring:")
    degree = target.degrees.get("theta", torch.ones(()))
    assert low <= float(degree.min()) and float(degree.max()) <= high


def test_centred_schools_are_claimed_and_keep_their_names(tmp_path):
    """Fitted in coordinates of its own, saved, and read back beside the model as written."""
    posterior = vf.fit(schools, Y, SIGMA, progress=False)
    assert posterior.verdict.status in ("reliable", "corrected")
    assert "necks" in [check.name for check in posterior.verdict.checks]
    exact = Hierarchy(Y.double(), SIGMA.double(), "HalfCauchy", 5.0, "neck_model", 0)
    assert abs(posterior.log_evidence - exact.log_evidence) < 0.02
    draws = posterior.sample(4000, seed=0)
    assert draws["theta"].shape == (4000, 8) and max(draw_errors(exact.points(draws), exact.draws(40_000)).values()) < 1
    assert any(note.startswith("centring:") for note in posterior.notes)
    path = posterior.save(tmp_path / "schools.safetensors")
    again = vf.load(path, target=PyroModel(schools, Y, SIGMA)).sample(100, seed=3)
    assert all(torch.allclose(again[name], value) for name, value in posterior.sample(100, seed=3).items())


def test_funnels_are_read_from_curvature():
    """A density of a scale (b = .7), six directions about a centre, and coordinates that hang on nothing."""
    torch.manual_seed(0)
    spread, centre = torch.randn(6, 6).double() + 3 * torch.eye(6), torch.randn(6).double()

    def log_p(x):
        v, offset = x[:, 0], (x[:, 1:7] - centre) @ spread.mT * torch.exp(-0.7 * x[:, :1])
        return -0.5 * (v.square() + offset.square().sum(-1) + x[:, 7:].square().sum(-1)) - 6 * 0.7 * v

    v = torch.randn(4000, 1).double()
    children = (0.7 * v).exp() * torch.linalg.solve(spread, torch.randn(6, 4000).double()).mT + centre
    x = torch.cat([v, children, torch.randn(4000, 2).double()], -1)
    found = funnels(LogDensity(log_p, dim=9), x, range(9))
    assert [f.v for f in found] == [0]
    (funnel,) = found
    assert funnel.rank == 6 and funnel.slope == pytest.approx(0.7, abs=0.01)
    assert torch.allclose(funnel.centre[1:7], centre, atol=1e-3)
    y, log_det = funnel.moved(x[:5], torch.tensor([0.5, -0.5, 1.0, 2.0, -3.0]).double())
    jacobian = torch.autograd.functional.jacobian(
        lambda r: funnel.moved(r[None], torch.tensor([0.5]).double())[0], x[0]
    )
    assert float(log_det[0]) == pytest.approx(float(torch.linalg.slogdet(jacobian.squeeze())[1]), abs=1e-6)
    back, _ = funnel.moved(y, -torch.tensor([0.5, -0.5, 1.0, 2.0, -3.0]).double())
    assert torch.allclose(back, x[:5], atol=1e-6)


def test_the_scale_of_many_is_found_among_them():
    """Two hundred coordinates, of which one, not the first, scales half of the others."""

    def log_p(x):
        v, children, rest = x[:, 120], x[:, :100], torch.cat([x[:, 100:120], x[:, 121:]], -1)
        squares = v.square() + (children * (-v[:, None]).exp()).square().sum(-1) + rest.square().sum(-1)
        return -0.5 * squares - 100 * v

    torch.manual_seed(0)
    x = torch.randn(4000, 200, dtype=torch.float64)
    x[:, :100] *= x[:, 120:121].exp()
    (found,) = funnels(LogDensity(log_p, dim=200), x, range(200))
    assert (found.v, found.rank) == (120, 100) and found.slope == pytest.approx(1.0, abs=0.01)
    even = torch.zeros(3600, dtype=torch.float64)
    cut = x[x[:, 120].argsort()[400:]]
    assert not necks(LogDensity(log_p, dim=200), Weights(cut, even, even))[0].passed


@pytest.mark.parametrize("seed", [0, 3, 4])
@pytest.mark.parametrize("how", ["density", "written", "recentred"])
def test_missing_necks_are_seen(how, seed):
    """Exact draws pass; without the 6 % of the smallest scales they do not, however the hierarchy is given."""
    torch.manual_seed(seed)
    hierarchy = known_target("neck", seed)
    model = PyroModel(hierarchy.model)
    target = {"density": hierarchy, "written": model, "recentred": model.recentred({"theta": 0.2})}[how]
    every = hierarchy.draws(40_000, seed)
    for share, passed in ((0.0, True), (0.06, False)):
        x = every[every[:, 1] >= every[:, 1].quantile(share)][:20_000]
        x = x if how == "density" else model.translate(x, target)
        even = torch.zeros(len(x), dtype=torch.float64)
        (check,) = necks(target, Weights(x, even, even))
        assert check.passed == passed, check.sentence
    name = "x[1]" if how == "density" else "tau"
    assert name in check.sentence and "not seen to fall" in check.sentence


@pytest.mark.parametrize("law", [torch.distributions.Laplace(0.0, 1.0), torch.distributions.StudentT(2.0)])
@pytest.mark.parametrize("located", [0.0, 1.0])
def test_necks_of_laws_whose_curvature_tells_nothing_are_seen(law, located):
    """A plain density of 20 Laplace or Student's t values, of latent scale and location, drawn exactly."""

    def log_p(x):
        z = (x[:, 2:] - located * x[:, 1:2]) * (-x[:, :1]).exp()
        return (law.log_prob(z) - x[:, :1]).sum(-1) - 0.5 * x[:, :2].square().sum(-1)

    torch.manual_seed(1)
    outer = torch.randn(40_000, 2).double()
    every = torch.cat([outer, located * outer[:, 1:] + outer[:, :1].exp() * law.sample((40_000, 20)).double()], -1)
    for share, passed in ((0.0, True), (0.06, False)):
        x = every[every[:, 0] >= every[:, 0].quantile(share)][:20_000]
        x[:12, 0] = -16.0  # a few far down, as fits have them
        x[:12, 2:] = located * x[:12, 1:2] + 1e-7 * torch.randn(12, 20).double()
        even = torch.zeros(len(x), dtype=torch.float64)
        (check,) = necks(LogDensity(log_p, dim=22), Weights(x, even, even))
        assert check.passed == passed, check.sentence
    assert "the posterior of x[0] is not seen to fall at its low end" in check.sentence


@pytest.mark.parametrize("form", ["factor", "noise"])
def test_necks_that_the_trace_does_not_tell_of_are_seen(form):
    """A scale in a factor, or of the data's noise, beside a site that is centrable: exact draws pass, and those whose
    smallest scales are missing do not."""

    def model():
        m, v = pyro.sample("m", dist.Normal(0.0, 1.0)), pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("theta", dist.Normal(m, 1.0).expand([2]).to_event(1))
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([20]).to_event(1).mask(False))
        if form == "factor":
            pyro.factor("x_given_v", dist.Normal(0.0, v.exp()).log_prob(x).sum(-1))
        else:
            pyro.sample("y", dist.Normal(x, v.exp()).to_event(1), obs=torch.zeros(20))

    torch.manual_seed(0)
    target = PyroModel(model)
    assert target.centrable == ["theta"] and target.scales() == []
    v, m = torch.randn(2, 40_000, 1, dtype=torch.float64)
    theta, x = m + torch.randn(40_000, 2).double(), v.exp() * torch.randn(40_000, 20).double()
    every = torch.cat([m, v, theta, x], -1)
    for share, passed in ((0.0, True), (0.06, False)):
        x = every[every[:, 1] >= every[:, 1].quantile(share)][:20_000]
        even = torch.zeros(len(x), dtype=torch.float64)
        (check,) = necks(target, Weights(x, even, even))
        assert check.passed == passed, check.sentence
    assert "the posterior of v is not seen to fall" in check.sentence


def test_nothing_is_moved_where_nothing_scales():
    x = torch.randn(5000, 3, dtype=torch.float64)
    even = torch.zeros(5000, dtype=torch.float64)
    assert necks(LogDensity(lambda x: -0.5 * x.square().sum(-1), dim=3), Weights(x, even, even)) == []


def test_a_guide_works_in_coordinates_of_its_own():
    """An AutoFlow of a centred hierarchy: its sites are the model's, log q of a draw is that of its own coordinates
    less the way to the model's, and against the model as written its ELBO is next to the evidence."""
    pyro.clear_param_store()
    hierarchy = known_target("neck_model", 5)
    guide = vf.AutoFlow(hierarchy.model, "gaussian", dtype=torch.float64)
    assert guide.flow.layers[-1].bijection.target.degrees
    draws = guide.draws(20_000)
    exact = hierarchy.draws(40_000)
    assert draws["theta"].shape == (20_000, hierarchy.dim - 2)
    off = (hierarchy.points(draws).mean(0) - exact.mean(0)).abs() / exact.std(0)
    assert float(off.max()) < 0.2  # a Gaussian, in coordinates where it nearly fits
    x = hierarchy.points(draws)[:6]
    log_q = guide.get_posterior().log_prob(x)
    own, logdet = guide.flow.layers[-1].bijection.inverse_and_logdet(x)
    plain = vf.Flow(list(guide.flow.layers)[:-1], guide.flow.base)
    assert torch.allclose(log_q, plain().log_prob(own) + logdet)
    target = PyroModel(hierarchy.model)
    elbo = mean_elbo(vf.log_weights(as_flow(guide, target), target, 4000).log_w)
    assert hierarchy.log_evidence - 0.5 < elbo < hierarchy.log_evidence + 0.02
    written = vf.AutoFlow(hierarchy.model, "gaussian", reparam=False, name="written")
    assert len(written.flow.layers) == len(guide.flow.layers) - 1


def test_a_posterior_becomes_a_guide_in_the_model_s_coordinates():
    pyro.clear_param_store()
    hierarchy = known_target("neck_model", 5)
    posterior = vf.fit(hierarchy.model, flow="gaussian", steps=20, progress=False)
    guide = vf.AutoFlow(hierarchy.model, posterior, dtype=torch.float64)
    drawn = hierarchy.points(guide.draws(20_000)).mean(0)
    assert torch.allclose(drawn, hierarchy.points(posterior.sample(20_000, weighted=False, seed=0)).mean(0), atol=0.05)


def test_a_model_in_float32_is_centred_and_looked_at():
    """A module's parameters hold its model in float32: degrees, coordinates and necks are found all the same."""
    offset = torch.nn.Parameter(torch.zeros(8, dtype=torch.float32))

    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        theta = pyro.sample("theta", dist.Normal(0.0, scale).expand([8]).to_event(1))
        pyro.sample(
            "y", dist.Normal(torch.addmv(offset, torch.eye(8, dtype=torch.float32), theta), 1.0).to_event(1), obs=Y / 10
        )

    torch.manual_seed(0)
    target, near, sentence = choose_centring(PyroModel(model), None)
    assert target.dtype == torch.float32 and near.dtype == torch.float64 and sentence.startswith("centring:")
    even = torch.zeros(2000, dtype=torch.float64)
    assert len(necks(target, Weights(near + 0.5 * torch.randn(2000, 9).double(), even, even))) == 1
