"""AutoFlow as a Pyro guide, and the diagnosis of guides: against closed forms and across save, copy and reload."""

import copy
import io
import math
import pickle
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)

import vi_flows as vf

Y = torch.tensor([0.5, 1.5, 1.0])
MEAN, SD = 0.75, 0.5  # of mu given Y
LOG_Z = -1.5 * math.log(2 * math.pi) - math.log(2) - 0.5 * (3.5 - 9 / 4)


@pytest.fixture(autouse=True)
def clean_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mixed(y):
    """Sites of several supports and shapes, in nested plates."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    cols, rows = pyro.plate("cols", 2, dim=-1), pyro.plate("rows", 3, dim=-2)
    with cols, rows:
        b = pyro.sample("b", dist.Normal(0.0, scale))
    with rows:
        mean = b.sum(-1, keepdim=True) + share[..., 0]
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y.unsqueeze(-1))


def trained(guide, model, *args, steps=100, lr=1e-2, loss=None):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), loss or Trace_ELBO(num_particles=32, vectorize_particles=True))
    losses = [svi.step(*args) for _ in range(steps)]
    return losses


def same_draws(a, b, n=5):
    torch.manual_seed(1)
    first = a.draws(n)
    torch.manual_seed(1)
    second = b.draws(n)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def fresh(seed, flow="spline", name="AutoFlow"):
    torch.manual_seed(seed)
    return vf.AutoFlow(mixed, flow, Y, locate=False, name=name)


@pytest.mark.parametrize("flow", ["auto", "planar", "iaf", lambda d: vf.recipes.sylvester(d, layers=2)])
def test_parameters_exist_before_the_first_call(flow):
    guide = vf.AutoFlow(mixed, flow, Y, locate=False)
    count = sum(p.numel() for p in guide.parameters())
    assert count > 10 and guide.flow.dim == 1 + 2 + 6 and len(guide.state_dict()) > 1
    guide(Y)
    assert sum(p.numel() for p in guide.parameters()) == count


def test_without_arguments_it_is_built_at_the_first_call():
    guide = vf.AutoFlow(conjugate)
    assert not list(guide.parameters())
    losses = trained(guide, conjugate, Y, steps=20)
    assert list(guide.parameters()) and all(map(math.isfinite, losses))
    assert list(vf.AutoFlow(lambda: conjugate(Y)).parameters())  # a model without arguments needs none


def test_a_located_guide_starts_at_the_posterior_of_a_gaussian_model():
    guide = vf.AutoFlow(conjugate, "spline", Y)
    low, middle, high = guide.quantiles([0.05, 0.5, 0.95])["mu"].tolist()
    assert middle == pytest.approx(MEAN, abs=0.02) and guide.median()["mu"].item() == pytest.approx(middle)
    assert low == pytest.approx(MEAN - 1.645 * SD, abs=0.04) and high == pytest.approx(MEAN + 1.645 * SD, abs=0.04)


def test_svi_finds_the_posterior_without_locating():
    guide = vf.AutoFlow(conjugate, "gaussian", Y, locate=False)
    losses = trained(guide, conjugate, Y, steps=400, lr=2e-2)
    assert sum(losses[-50:]) / 50 == pytest.approx(-LOG_Z, abs=0.02)
    posterior = vf.diagnose(guide, conjugate, Y, progress=False, num_draws=1000)
    assert posterior.verdict.status == "reliable" and posterior.log_evidence == pytest.approx(LOG_Z, abs=0.005)
    assert -sum(losses[-50:]) / 50 == pytest.approx(posterior.elbo, abs=0.02)


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=4),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2),
    ],
)
def test_losses_of_pyro_agree(loss):
    guide = vf.AutoFlow(mixed, "spline", Y)
    svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 0.0}), loss)
    repeats = max(1, 400 // loss.num_particles)
    losses = torch.tensor([svi.evaluate_loss(Y) for _ in range(repeats)])
    target = vf.PyroModel(mixed, Y)
    log_w = vf.log_weights(copy.deepcopy(guide.flow).double(), target, 4000).log_w.detach()
    se = float((losses.std() ** 2 / repeats + log_w.var() / 4000).sqrt())
    assert float(losses.mean() + log_w.mean()) == pytest.approx(0.0, abs=5 * se)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    guide = vf.AutoFlow(mixed, "spline", Y, locate=False)
    drawn = Predictive(mixed, guide=guide, num_samples=7, parallel=parallel)(torch.zeros(3))
    assert drawn["b"].reshape(7, -1).shape == (7, 6) and drawn["share"].reshape(7, -1).sum(-1).allclose(torch.ones(7))


def test_state_dict_gives_the_same_draws():
    one, other = fresh(0), fresh(1, name="other")
    trained(one, mixed, Y, steps=5)
    assert not same_draws(one, other)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_draws(one, other)


def test_deepcopy_is_apart_and_pickle_leaves_the_original_whole():
    one = fresh(0)
    trained(one, mixed, Y, steps=5)
    other = copy.deepcopy(one)
    assert same_draws(one, other) and other.model is one.model
    with torch.no_grad():
        next(other.flow.parameters()).add_(0.1)
    assert not same_draws(one, other)
    again = pickle.loads(pickle.dumps(one))
    with pytest.warns(UserWarning, match="parameters from Pyro's"):
        assert same_draws(one, again) and one.model is other.model
    one(Y)
    again(Y)


def test_pyros_parameter_store_gives_the_same_draws(tmp_path):
    one = fresh(0)
    trained(one, mixed, Y, steps=5)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    other = fresh(1)
    pyro.get_param_store().load(tmp_path / "store.pt", map_location="cpu")
    with pytest.warns(UserWarning, match="parameters from Pyro's parameter store"):
        assert same_draws(one, other)  # before any call
    other(Y)
    assert same_draws(one, other)
    before = other.draws(3)["scale"]
    trained(other, mixed, Y, steps=3)  # what is optimised is what is drawn from
    assert not torch.equal(before, other.draws(3)["scale"])


def test_a_store_for_other_data_is_refused(tmp_path):
    trained(vf.AutoFlow(conjugate, "gaussian", Y), conjugate, Y, steps=2)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    other = vf.AutoFlow(conjugate, "gaussian", Y + 5)  # its whitening is another
    pyro.get_param_store().load(tmp_path / "store.pt", map_location="cpu")
    with pytest.raises(ValueError, match=r"\(constants differs\), with other data or options; .* load a state_dict"):
        other.median()


def test_another_guides_parameters_are_refused():
    trained(fresh(0), mixed, Y, steps=1)
    with pytest.raises(ValueError, match=r"guide: expected the parameters of AutoFlow.flow .* pyro.clear_param_store"):
        vf.AutoFlow(conjugate, "spline", Y, locate=False)(Y)
    vf.AutoFlow(conjugate, "spline", Y, locate=False, name="other")(Y)


def test_module_local_parameters():
    with pyro.settings.context(module_local_params=True):
        guide = fresh(0)
        before = guide.draws(2)
        trained_by = Trace_ELBO(num_particles=4)(mixed, guide)
        optimizer = torch.optim.Adam(trained_by.parameters(), lr=0.01)
        trained_by(Y).backward()
        optimizer.step()
        assert not torch.equal(before["scale"], guide.draws(2)["scale"]) and not len(pyro.get_param_store())


def test_warm_start_both_ways():
    posterior = vf.fit(mixed, Y, steps=60, progress=False, num_draws=1000, reparam=False)
    guide = vf.AutoFlow(mixed, posterior, Y, dtype=torch.float64)
    x = torch.randn(6, posterior.dim, dtype=torch.float64)
    assert torch.equal(guide.get_posterior(Y).log_prob(x), posterior.log_prob(x))
    back = vf.fit(mixed, Y, init=guide, steps=0, progress=False, num_draws=1000)
    assert torch.allclose(back.log_prob(x), posterior.log_prob(x), rtol=1e-12)
    single = vf.AutoFlow(mixed, posterior, Y)
    assert single.flow.dtype == torch.float32
    assert torch.allclose(single.get_posterior().log_prob(x.float()), posterior.log_prob(x).float(), atol=1e-3)
    trained(single, mixed, Y, steps=2)
    assert all(p.requires_grad for p in single.parameters()) and posterior.flow.layers[0].training is not None


def test_warm_start_from_a_guide_needs_one_with_a_flow():
    guide = AutoNormal(conjugate)
    with pytest.raises(ValueError, match="init: expected a Posterior, a Flow or an AutoFlow, got AutoNormal"):
        vf.fit(conjugate, Y, init=guide, progress=False)


def test_another_models_posterior_is_refused():
    posterior = vf.fit(conjugate, Y, steps=0, progress=False, num_draws=500)
    with pytest.raises(ValueError, match="flow: expected a Posterior of dim 9"):
        vf.AutoFlow(mixed, posterior, Y)
    guide = vf.AutoFlow(conjugate, "planar", Y, locate=False)
    with pytest.raises(ValueError, match="latent sites"):
        vf.diagnose(guide, mixed, Y, progress=False)


def test_medians_and_quantiles_have_the_shapes_of_sites():
    guide = vf.AutoFlow(mixed, "spline", Y, locate=False)
    median, thirds = guide.median(Y), guide.quantiles([1 / 3, 2 / 3], Y)
    assert {k: tuple(v.shape) for k, v in median.items()} == {"scale": (), "share": (3,), "b": (3, 2)}
    assert thirds["b"].shape == (2, 3, 2) and (thirds["scale"][0] < thirds["scale"][1]).all()
    drawn = guide.draws(20_000)
    assert float((drawn["scale"] < median["scale"]).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(guide.median()["b"], median["b"])
    with pytest.raises(ValueError, match="quantiles: expected"):
        guide.quantiles([1.5])


def test_the_path_gradient_vanishes_at_the_posterior():
    pull = {}
    for path in (False, True):
        guide = vf.AutoFlow(conjugate, "gaussian", Y, path=path, dtype=torch.float64, name=f"path{path}")
        guide.flow.layers[0].own["matrix"].data.zero_()
        guide.flow.layers[0].own["shift"].data.zero_()  # what is left is the located Gaussian: the posterior
        loss = Trace_ELBO(num_particles=20, vectorize_particles=True).differentiable_loss(conjugate, guide, Y.double())
        assert loss.item() == pytest.approx(-LOG_Z, abs=1e-3)
        loss.backward()
        pull[path] = max(float(p.grad.abs().max()) for p in guide.flow.parameters())
    assert pull[True] < 1e-2 * pull[False]


def test_subsampled_data_can_be_trained():
    data = torch.randn(200) + 1

    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(data), subsample_size=50) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data[index])

    with pytest.warns(UserWarning, match="cannot be located"):
        guide = vf.AutoFlow(model, "gaussian", data)
    trained(guide, model, data, steps=400, lr=2e-2, loss=Trace_ELBO(num_particles=8))
    mean, sd = float(data.sum() / 201), 201**-0.5
    assert guide.median()["mu"].item() == pytest.approx(mean, abs=sd)


def test_part_of_a_guide_list():
    guide = guide_list_with_flow(mixed)
    assert all(map(math.isfinite, trained(guide, mixed, Y, steps=3)))


# --- diagnosis


def exact(guide_class):
    """A guide of Pyro's set to the posterior of the conjugate model."""
    guide = guide_class(conjugate)
    guide(Y)
    with torch.no_grad():
        for name, value in guide.named_parameters():
            if "loc" in name:
                value.fill_(MEAN)
            elif "scale" in name and "tril" not in name:
                value.fill_(math.log(math.expm1(SD)))
    return guide


def by_hand(y):
    pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(MEAN)), pyro.param("s", torch.tensor(SD))))


@pytest.mark.parametrize("make", [partial(exact, AutoNormal), partial(exact, AutoDiagonalNormal), lambda: by_hand])
def test_an_exact_guide_is_reliable(make):
    posterior = vf.diagnose(make(), conjugate, Y, progress=False, num_draws=1000)
    assert posterior.verdict.status == "reliable"
    assert posterior.log_evidence == pytest.approx(LOG_Z, abs=1e-3) and posterior.elbo == pytest.approx(LOG_Z, abs=1e-4)
    assert posterior.ess == pytest.approx(1000, rel=1e-3) and posterior.khat == 0
    assert posterior.sample(2000, seed=0)["mu"].mean().item() == pytest.approx(MEAN, abs=4 * SD / 2000**0.5)


def guide_list_with_flow(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["b"])))
    guide.append(vf.AutoFlow(pyro.poutine.block(model, expose=["scale", "share"]), "planar", Y, locate=False))
    return guide


def guide_list(model):
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, expose=["b"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["scale", "share"])))
    return guide


@pytest.mark.parametrize(
    "make",
    [
        AutoNormal,
        AutoMultivariateNormal,
        AutoLowRankMultivariateNormal,
        AutoIAFNormal,
        lambda model: AutoNormalizingFlow(model, partial(transforms.iterated, 1, transforms.affine_coupling)),
        guide_list,
        lambda model: vf.AutoFlow(model, "planar", Y, locate=False),
    ],
)
def test_the_elbo_of_a_diagnosis_is_that_of_svi(make):
    guide = make(mixed)
    svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(num_particles=100, vectorize_particles=True))
    losses = torch.tensor([svi.evaluate_loss(Y) for _ in range(20)])
    posterior = vf.diagnose(guide, mixed, Y, progress=False, num_draws=500)
    assert posterior.elbo + float(losses.mean()) == pytest.approx(0.0, abs=6 * float(losses.std()) / 20**0.5 + 0.02)
    assert set(posterior.sample(3)) == {"scale", "share", "b"}
    x = posterior.flow_draws[:5]
    direct = posterior.target.log_prob(x) - posterior.log_weights[:5]
    assert torch.allclose(posterior.log_prob(x), direct, atol=1e-4)


def test_a_collapsed_guide_is_unreliable():
    def two_modes():
        mixture = dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(torch.tensor([-6.0, 6.0]), 1.0)
        )
        pyro.sample("x", mixture)

    def one_mode():
        pyro.sample("x", dist.Normal(6.0, 1.0))

    posterior = vf.diagnose(one_mode, two_modes, progress=False, num_draws=1000)
    assert posterior.ess > 990  # what its own weights say
    assert posterior.verdict.status != "reliable" and posterior.log_evidence == pytest.approx(0.0, abs=0.03)


REFUSED = {
    "a point": (lambda: AutoDelta(mixed), "got a point estimate"),
    "structured": (lambda: AutoStructured(mixed), "density cannot be told"),
    "planar": (
        lambda: AutoNormalizingFlow(mixed, partial(transforms.iterated, 1, transforms.planar)),
        "log q of any value",
    ),
    "a site too few": (lambda: AutoNormal(pyro.poutine.block(mixed, hide=["b"])), "got none for 'b'"),
    "no guide": (lambda: 3, "expected a Pyro guide, a Flow or a Posterior, got int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_refused_in_one_line(case):
    make, words = REFUSED[case]
    guide = make()
    if callable(guide):
        guide(Y)
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        vf.diagnose(guide, mixed, Y, progress=False)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("guide: expected")


def test_more_of_what_is_refused():
    def of_another_shape(y):
        pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def outside(y):
        pyro.sample("scale", dist.Normal(-3.0, 0.1))
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("b", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))

    masked = pyro.poutine.mask(by_hand, mask=False)
    scaled = pyro.poutine.scale(by_hand, scale=0.5)
    cases = [
        (of_another_shape, conjugate, "site 'mu' to have shape"),
        (outside, mixed, "draws of 'scale' in its support"),
        (masked, conjugate, "poutine.scale or poutine.mask"),
        (scaled, conjugate, "poutine.scale or poutine.mask"),
        (lambda: None, conjugate, "guide: expected arguments"),
    ]
    for guide, model, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            vf.diagnose(guide, model, Y, progress=False)


def test_a_diagnosed_guide_can_be_trained_on():
    guide = guide_list_with_flow(mixed)
    trained(guide, mixed, Y, steps=2)
    before = {name: (id(p), p.requires_grad) for name, p in guide.named_parameters()}
    vf.diagnose(guide, mixed, Y, progress=False, num_draws=500)
    assert before == {name: (id(p), p.requires_grad) for name, p in guide.named_parameters()}
    values = [p.detach().clone() for p in guide.parameters()]
    trained(guide, mixed, Y, steps=2)
    assert not any(torch.equal(p, q) for p, q in zip(guide.parameters(), values, strict=True))


def test_a_missed_dependence_is_not_called_reliable():
    cov = torch.tensor([[1.0, 0.7], [0.7, 1.0]])

    def model():
        pyro.sample("a", dist.MultivariateNormal(torch.zeros(2), cov))

    def independent():
        pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    posterior = vf.diagnose(independent, model, progress=False, num_draws=1000)
    checks = {check.name: check for check in posterior.verdict.checks}
    assert posterior.verdict.status == "corrected" and not checks["divergence"].passed and checks["own draws"].passed
    # KL of the independent normals to the correlated ones: log|C|/2 + tr(C⁻¹)/2 − 1
    kl = 0.5 * math.log(1 - 0.49) + 1 / (1 - 0.49) - 1
    assert posterior.log_evidence - posterior.elbo == pytest.approx(kl, abs=0.02)
    with pytest.raises(ValueError, match="cannot be trained on"):
        vf.fit(model, init=posterior, progress=False)
    with pytest.raises(ValueError, match="flow of its own"):
        vf.AutoFlow(model, posterior)


def test_a_random_extra_site_is_refused():
    def guide(y):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Normal(shift, 1.0))

    with pytest.raises(ValueError, match="random numbers beside the latent sites"):
        vf.diagnose(guide, conjugate, Y, progress=False)


def test_a_flow_and_a_posterior_can_be_diagnosed():
    target = vf.LogDensity(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    flow = vf.recipes.gaussian(2)
    posterior = vf.diagnose(flow, target, progress=False, num_draws=500)
    assert posterior.verdict.status == "reliable" and posterior.log_evidence == pytest.approx(
        math.log(2 * math.pi), abs=0.01
    )
    again = vf.diagnose(posterior, target, progress=False, num_draws=500)
    assert torch.equal(again.log_weights, posterior.log_weights)
    with pytest.raises(ValueError, match="flow: expected dim 2"):
        vf.diagnose(vf.recipes.gaussian(3), target, progress=False)
    with pytest.raises(TypeError, match="target: expected a Pyro model beside a Pyro guide"):
        vf.diagnose(by_hand, target, progress=False)


def test_diagnosis_leaves_the_parameter_store_and_generator_alone():
    by_hand(Y)
    torch.manual_seed(3)
    state, keys = torch.get_rng_state(), list(pyro.get_param_store())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vf.diagnose(by_hand, conjugate, Y, progress=False, num_draws=500)
    assert torch.equal(state, torch.get_rng_state()) and list(pyro.get_param_store()) == keys


def taking(y, scale=1.0, steps=3, path=False):
    """A model with arguments of the names of options: steps of fit, path of AutoFlow."""
    mu = pyro.sample("mu", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(mu, steps - 2.0), obs=y)


def test_keywords_of_a_model_are_passed_alike():
    y = torch.tensor([1.0, 2.0])
    posterior = vf.fit(taking, y=y, scale=2.0, progress=False, num_draws=500)
    assert posterior.log_evidence == pytest.approx(vf.fit(taking, y, 2.0, progress=False).log_evidence, abs=1e-9)
    guide = vf.AutoFlow(taking, "gaussian", y=y, scale=2.0)
    found = vf.diagnose(guide, taking, y=y, scale=2.0, progress=False, num_draws=500)
    assert found.log_evidence == pytest.approx(posterior.log_evidence, abs=0.02)
    for call, words in (
        (lambda: vf.fit(taking, y, steps=10), "fit: 'steps' is an option of fit and an argument of the model"),
        (lambda: vf.AutoFlow(taking, "planar", y, path=True), "AutoFlow: 'path' is an option of AutoFlow and an"),
        (lambda: vf.diagnose(guide, taking, y, scal=2.0), "diagnose: unknown option 'scal'"),
        (lambda: vf.AutoFlow(taking, "planar", y, locat=False), "AutoFlow: unknown option 'locat'"),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
    own = vf.fit(vf.PyroModel(taking, y, steps=4), steps=10, progress=False, num_draws=500)
    assert own.settings.options["steps"] == 10
