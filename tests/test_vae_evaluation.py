"""Bounds, refinement and evaluation of VAEs against factor analysis, where log p(x) and p(z|x) have closed forms."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal, kl_divergence

from vi_flows import recipes
from vi_flows.report.vae_page import GAP, ZOOM, montage, write_images, write_page
from vi_flows.vae.bounds import bound, log_mean_by_row
from vi_flows.vae.evaluation import Estimate, _unseen, evaluate
from vi_flows.vae.likelihoods import Bernoulli, Likelihood
from vi_flows.vae.model import POSTERIORS, VAE, Architecture, build
from vi_flows.vae.refine import RefinedDraws, folded, refine, terms

DIM, LATENT, SD = 12, 3, 0.4
DOUBLE = torch.float64
IDENTITY = (torch.zeros(1, LATENT, dtype=DOUBLE), torch.ones(1, LATENT, dtype=DOUBLE))


class Noise(Likelihood):
    """x = raw + SD ε."""

    channels, levels = 1, None

    def pixels(self, raw, x):
        return Normal(raw.squeeze(-2), SD).log_prob(x)

    def mean(self, raw):
        return raw.squeeze(-2)

    def sample(self, raw):
        return torch.normal(raw.squeeze(-2), SD)

    def check(self, x, name):
        pass


class Linear(nn.Module):
    """raw = W z + b, one channel."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, z):
        return (z @ self.weight.mT + self.bias).unsqueeze(-2)


class FactorAnalysis:
    """x = W z + b + SD ε, z ~ N(0, I): log p(x) = log N(x; b, W Wᵀ + SD² I), p(z|x) = N(S Wᵀ(x − b)/SD², S)."""

    def __init__(self, rows=40):
        self.weight, self.bias = torch.randn(DIM, LATENT, dtype=DOUBLE), torch.randn(DIM, dtype=DOUBLE)
        self.weight[:, 1] += 1.5 * self.weight[:, 0]  # so that coordinates of z depend on one another given x
        noise = torch.full((DIM,), SD**2, dtype=DOUBLE)
        self.marginal = LowRankMultivariateNormal(self.bias, self.weight, noise)
        self.precision = torch.eye(LATENT, dtype=DOUBLE) + self.weight.mT @ self.weight / SD**2
        self.covariance = self.precision.inverse()
        self.x = self.marginal.sample((rows,))
        self.log_p = self.marginal.log_prob(self.x)

    def means(self):
        """The encoder of the posterior mean as a layer."""
        layer = nn.Linear(DIM, LATENT, dtype=DOUBLE)
        gain = self.covariance @ self.weight.mT / SD**2
        layer.weight.data, layer.bias.data = gain, -gain @ self.bias
        return layer

    def vae(self, scale_tril):
        """A VAE whose q(z|x) has the exact mean, and this triangular scale."""
        flow = recipes.gaussian(LATENT, LATENT).double()
        head = flow.layers[0]
        # shift = context; matrix: the strict triangle times √D, the diagonal as bounded logarithm (bound 10)
        raw = scale_tril.tril(-1) * LATENT**0.5 + torch.diag(10 * torch.atanh(scale_tril.diagonal().log() / 10))
        head.weight.data.zero_()
        head.weight.data[:LATENT] = torch.eye(LATENT, dtype=DOUBLE) * LATENT**0.5
        head.bias.data = torch.cat([torch.zeros(LATENT, dtype=DOUBLE), raw.reshape(-1)])
        return VAE(self.means(), flow, Linear(self.weight, self.bias), Noise()).double()

    def exact(self):
        return self.vae(torch.linalg.cholesky(self.covariance))

    def diagonal_gap(self):
        """KL of the best diagonal Gaussian to p(z|x): ½ (Σ log Λ_ii − log|Λ|), Λ the precision."""
        return 0.5 * float(self.precision.diagonal().log().sum() - self.precision.logdet())


@pytest.fixture
def model():
    return FactorAnalysis()


def small(posterior="diagonal", latent=3):
    """A Bernoulli VAE of 4 × 4 pixels whose posterior is somewhere, and rows for it."""
    options = {"hidden": (12, 8), "decoder_hidden": (10,)}
    vae = build(Architecture((1, 4, 4), latent, posterior=posterior, network_options=options))
    for value in vae.posterior.parameters():
        value.data += 0.2 * torch.randn_like(value)
    return vae, torch.bernoulli(torch.full((9, 16), 0.4))


# --- bounds


def test_with_the_exact_posterior_every_bound_is_the_log_likelihood(model):
    elbo, iwae = bound(model.exact(), model.x, draws=7)
    torch.testing.assert_close(elbo, model.log_p, rtol=0, atol=1e-8)
    torch.testing.assert_close(iwae, model.log_p, rtol=0, atol=1e-8)


def test_elbo_of_another_posterior_is_lower_by_its_divergence_and_iwae_comes_close(model):
    wider = 1.3 * torch.linalg.cholesky(model.covariance)
    elbo, iwae = bound(model.vae(wider), model.x, draws=4000)
    exact = MultivariateNormal(torch.zeros(LATENT, dtype=DOUBLE), model.covariance)
    kl = kl_divergence(MultivariateNormal(exact.loc, scale_tril=wider), exact)
    assert float((model.log_p - elbo - kl).mean()) == pytest.approx(0, abs=0.01)
    torch.testing.assert_close(iwae, model.log_p, rtol=0, atol=0.1)


def test_iwae_is_as_in_burda_et_al(model):
    """log (1/K) Σ w by hand, from the same noise, row by row."""
    vae = model.vae(torch.eye(LATENT, dtype=DOUBLE) * 0.3)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        noise = [torch.randn(20, LATENT, dtype=DOUBLE) for _ in model.x]
    _, iwae = bound(vae, model.x, draws=20, seed=5)
    for i in (0, 17):
        mean = vae.encoder(model.x[i]).detach()
        q, prior = Normal(mean, 0.3), Normal(torch.zeros_like(mean), 1.0)
        z = mean + 0.3 * noise[i]
        p = Normal(z @ model.weight.mT + model.bias, SD).log_prob(model.x[i]).sum(-1)
        w = (p + prior.log_prob(z).sum(-1) - q.log_prob(z).sum(-1)).exp()
        assert float(iwae[i]) == pytest.approx(float(w.mean().log()), abs=1e-6)


def test_log_mean_of_even_weights():
    torch.testing.assert_close(
        log_mean_by_row(torch.full((5, 2), -700.0, dtype=DOUBLE)), torch.full((2,), -700.0).double()
    )


@pytest.mark.parametrize("posterior", ["diagonal", "iaf"])
def test_chunks_change_nothing(posterior):
    vae, x = small(posterior)
    whole = bound(vae, x, draws=6, seed=3, chunk=1000)
    for chunk in (1, 4, 6, 13, 54):
        for got, expected in zip(bound(vae, x, draws=6, seed=3, chunk=chunk), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_memory_is_bounded_by_the_chunk():
    vae, x = small()
    seen, encoded = [], []
    vae.decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][..., 0].numel()))
    vae.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    bound(vae, x, draws=50, chunk=20)
    assert max(seen) <= 20 and sum(seen) == 9 * 50
    assert sum(encoded) == 9  # each row once


def test_many_numbers_a_draw_make_chunks_smaller(monkeypatch):
    vae, x = small()
    seen = []
    expected = bound(vae, x, draws=50)
    monkeypatch.setattr("vi_flows.vae.bounds.DECODED_NUMBERS", 16 * 7)
    vae.decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][..., 0].numel()))
    torch.testing.assert_close(bound(vae, x, draws=50), expected, rtol=0, atol=1e-4)
    assert max(seen) == 7 and sum(seen) == 9 * 50


def test_bound_depends_on_its_seed_alone_and_leaves_no_trace():
    vae, x = small()
    vae.train()
    vae.decoder.eval()
    state = torch.get_rng_state()
    first = bound(vae, x, draws=5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second, other = bound(vae, x, draws=5, seed=1), bound(vae, x, draws=5, seed=2)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert vae.encoder.training and not vae.decoder.training
    assert first[0].dtype == DOUBLE and not first[0].requires_grad


def test_dropout_is_off():
    vae, x = small()
    vae.encoder = nn.Sequential(vae.encoder, nn.Dropout(0.5))
    vae.train()
    assert torch.equal(bound(vae, x, draws=4)[0], bound(vae, x, draws=4)[0])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"x": torch.zeros(16)}, "x: expected rows"),
        ({"x": torch.zeros(0, 16)}, "x: expected rows"),
        ({"draws": 0}, "draws: expected a positive integer"),
        ({"chunk": 0}, "chunk: expected a positive integer"),
    ],
)
def test_bound_refuses(arguments, words):
    vae, x = small()
    with pytest.raises(ValueError, match=words) as error:
        bound(**({"vae": vae, "x": x} | arguments))
    assert "\n" not in str(error.value)


# --- refinement


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_folded_flow_is_the_flow_at_its_context(posterior):
    vae, x = small(posterior, latent=5)
    h, noise = vae.encoder(x), torch.randn(6, 9, 5)
    z, log_q = vae.posterior(h).from_noise(noise)
    frame = (torch.zeros(9, 5), torch.ones(9, 5))
    got = terms(vae, x, RefinedDraws(vae.posterior), frame, folded(vae.posterior, h, 9), noise)
    torch.testing.assert_close(got.z, z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.log_q, log_q, rtol=1e-4, atol=1e-4)


def test_refinement_reaches_the_log_likelihood_from_a_wrong_start(model):
    vae = model.vae(torch.eye(LATENT, dtype=DOUBLE) * 0.7)
    vae.encoder.bias.data += 0.5
    assert float((model.log_p - bound(vae, model.x, 200)[0]).mean()) > 10
    refined = refine(vae, model.x[:20], steps=600, lr=0.1, rows=13)
    torch.testing.assert_close(refined.bound(500)[0], model.log_p[:20], rtol=0, atol=0.05)


@pytest.mark.parametrize("frame", [False, True])
def test_full_covariance_is_better_than_diagonal_by_the_known_gap(model, frame):
    vae, x = model.exact(), model.x[:10]
    mean = vae.encoder(x).detach()
    options = {"steps": 500, "lr": 0.1, "frame": (mean, torch.full_like(mean, 0.2)) if frame else None}
    full = refine(vae, x, posterior=recipes.gaussian(LATENT).double(), **options).bound(2000)[0]
    diagonal = refine(vae, x, posterior=recipes.diagonal(LATENT).double(), **options).bound(2000)[0]
    torch.testing.assert_close(full, model.log_p[:10], rtol=0, atol=0.1)
    assert model.diagonal_gap() > 0.5
    torch.testing.assert_close(full - diagonal, torch.full_like(full, model.diagonal_gap()), rtol=0, atol=0.1)


def test_a_frame_moves_and_scales(model):
    """Draws of a Gaussian flow in a frame, scored by the density of the moved and scaled Gaussian."""
    vae, x = model.exact(), model.x[:1]
    flow = recipes.gaussian(LATENT).double()
    loc, scale = torch.randn(1, LATENT, dtype=DOUBLE), 0.5 + torch.rand(1, LATENT, dtype=DOUBLE)
    noise = torch.randn(8, 1, LATENT, dtype=DOUBLE)
    got = terms(vae, x, RefinedDraws(flow), (loc, scale), folded(flow, None, 1), noise)
    z = flow().from_noise(noise)[0]
    expected = flow().log_prob(z) - scale.log().sum()
    torch.testing.assert_close(got.z, loc + scale * z)
    torch.testing.assert_close(got.log_q, expected)


def test_rows_do_not_disturb_each_other(model):
    """A row's posterior is the same beside others: the same noise, with the other rows made very different."""
    vae = model.exact()
    x = model.x[:4]
    other = torch.cat([x[:2], 5 * x[2:]])
    first, second = (refine(vae, rows, steps=20, seed=1).parameters for rows in (x, other))
    for name, value in first.items():
        torch.testing.assert_close(value[:2], second[name][:2], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(value[2:], second[name][2:])


def test_refinement_changes_no_parameter_and_depends_on_its_seed_alone():
    vae, x = small("spline")
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    first, second, other = (refine(vae, x[:3], steps=5, seed=seed).bound(20)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in vae.parameters())


def test_refinement_raises_the_elbo_of_a_flow():
    vae, x = small("iaf")
    refined = refine(vae, x, steps=150)
    assert refined.trace.shape == (150, 9)
    assert (refined.bound(500)[0] > bound(vae, x, 500)[0]).all()


def test_refine_refuses(model):
    vae = model.exact()
    for options, words in (
        ({"posterior": recipes.diagonal(LATENT + 1).double()}, "posterior: expected a flow of dim 3 without context"),
        ({"posterior": recipes.diagonal(LATENT, 2).double()}, "posterior: expected a flow of dim 3 without context"),
        ({"steps": 0}, "steps: expected a positive integer"),
        ({"x": model.x[0]}, "x: expected rows of shape"),
        ({"frame": IDENTITY}, "frame: expected locations and positive scales"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            refine(**({"vae": vae, "x": model.x} | options))
        assert "\n" not in str(error.value)


# --- evaluation


def test_evaluation_of_an_exact_model(model):
    found = evaluate(model.exact(), model.x, draws=50, khat_rows=5, refine_rows=4, refine_steps=30)
    truth = Estimate.of(model.log_p)
    for estimate in (found.elbo, found.iwae):
        assert (estimate.value, estimate.se) == pytest.approx((truth.value, truth.se), abs=1e-8)
    assert found.reconstruction.value - found.kl.value == pytest.approx(found.elbo.value, abs=1e-9)
    assert found.khat == (0.0,) * 5 and max(found.unseen) < 0.02
    assert abs(found.gap.value) < 0.05
    assert found.bits is None
    assert any("no amortisation gap was seen" in sentence for sentence in found.sentences)
    # KL(q‖p(z)) of each row in closed form
    mean = model.exact().encoder(model.x).detach()
    kl = 0.5 * (mean.square().sum(-1) + model.covariance.trace() - model.covariance.logdet() - LATENT)
    assert found.kl.value == pytest.approx(float(kl.mean()), abs=0.1)


def test_narrow_posteriors_have_heavy_weights(model):
    """A Gaussian q of c times p's scale: w ~ exp(½ (1/c² − 1) χ²_D) has tail shape k = 1 − c²."""
    narrow = 0.3 * torch.linalg.cholesky(model.covariance)
    found = evaluate(model.vae(narrow), model.x, draws=5, khat_rows=20, khat_draws=2000, refine_rows=0)
    assert sum(found.khat) / 20 == pytest.approx(0.91, abs=0.15)
    assert any(s.startswith("k̂ is above 0.7 for") and "unknown amount" in s for s in found.sentences)
    assert min(found.unseen) > 0.02


def test_amortisation_gap_is_the_divergence_that_refining_removes(model):
    wider = 1.5 * torch.linalg.cholesky(model.covariance)
    found = evaluate(model.vae(wider), model.x, draws=5, khat_rows=0, refine_rows=20, refine_steps=300)
    kl = LATENT * (0.5 * (1.5**2 - 1) - math.log(1.5))
    assert found.gap.value == pytest.approx(kl, abs=max(4 * found.gap.se, 0.03))
    assert found.khat == () and any("at least that much is lost" in sentence for sentence in found.sentences)


def test_active_units_are_counted_without_the_noise_of_few_draws(model):
    """E_q[z] varies over rows in the units that the encoder moves: here all of three, then all but one."""
    vae = model.exact()
    x = model.marginal.sample((400,))
    means = vae.encoder(x).detach().var(0)
    found = evaluate(vae, x, draws=2, khat_rows=0, refine_rows=0)
    assert found.activity == pytest.approx(means.tolist(), rel=0.1) and found.active_units == 3
    vae = model.vae(torch.eye(LATENT, dtype=DOUBLE))  # sd 1: two draws add .5 to the variance of their mean
    vae.encoder.weight.data[1] = 0
    found = evaluate(vae, x, draws=2, khat_rows=0, refine_rows=0)
    assert found.activity[1] < 0.15 < min(found.activity[0], found.activity[2])
    found = evaluate(vae, x, draws=400, khat_rows=0, refine_rows=0)
    assert found.active_units == 2


def test_rows_are_a_seeded_random_choice(model):
    vae = model.exact()
    order = model.log_p.argsort()
    x = model.x[order]  # sorted: the first rows are the worst
    options = {"draws": 2, "max_rows": 20, "khat_rows": 0, "refine_rows": 0}
    first, again, other = (evaluate(vae, x, seed=seed, **options) for seed in (0, 0, 1))
    assert first == again and first.elbo != other.elbo
    assert (first.rows, first.given) == (20, 40) and "20 (chosen at random) of 40" in first.sentences[0]
    assert first.elbo.value > float(model.log_p[order][:20].mean()) + 0.5


def test_evaluation_is_the_same_whatever_the_chunk_and_leaves_no_trace():
    vae, x = small("planar")
    options = {"draws": 20, "khat_rows": 4, "khat_draws": 200, "refine_rows": 3, "refine_steps": 5}
    state = torch.get_rng_state()
    first, second = evaluate(vae, x, chunk=7, **options), evaluate(vae, x, chunk=10_000, **options)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("elbo", "iwae", "reconstruction", "kl", "gap"):
        assert getattr(first, name).value == pytest.approx(getattr(second, name).value, abs=1e-4)
    assert first.khat == pytest.approx(second.khat, abs=0.02)


def test_a_weight_that_outweighs_all_hides_as_much():
    """Where one weight is most of the sum no tail can be fitted: as much again may lie beyond it."""
    log_w = torch.zeros(1000, dtype=torch.float64)
    assert _unseen(log_w) < 0.01
    log_w[0] = math.log(1000)
    assert _unseen(log_w) >= 0.5
    log_w[0] = 60.0
    assert _unseen(log_w) == pytest.approx(1)


def test_bits_per_dimension():
    """A uniform pixel of 256 levels has 8 bits, as a probability of levels and as a density on [0, 1]."""
    pmf = Estimate(-10 * math.log(256), 10 * math.log(2)).bits(10)
    density = Estimate(0.0, 10 * math.log(2)).bits(10, 256)
    assert (pmf.value, pmf.se) == pytest.approx((8.0, 1.0))
    assert (density.value, density.se) == pytest.approx((8.0, 1.0))


def test_bits_are_given_for_grey_levels_only():
    options = {"draws": 2, "khat_rows": 0, "refine_rows": 0}
    x = torch.randint(0, 256, (5, 16)) / 255
    for likelihood, dequantised in (("logistic", None), ("categorical", None), ("gaussian", 256)):
        vae = build(Architecture((1, 4, 4), 2, likelihood=likelihood, network_options={"hidden": (8,)}))
        found = evaluate(vae, x, dequantised=dequantised, **options)
        offset = 8 if dequantised else 0
        assert found.bits.value == pytest.approx(offset - found.iwae.value / 16 / math.log(2))
        assert found.elbo_bits.value == pytest.approx(offset - found.elbo.value / 16 / math.log(2))
    assert evaluate(vae, x, **options).bits is None
    assert evaluate(*small(), **options).bits is None


def test_as_dict_is_json():
    found = evaluate(*small(), draws=3, khat_rows=2, khat_draws=100, refine_rows=2, refine_steps=3)
    read = json.loads(json.dumps(found.as_dict()))
    assert read["elbo"] == {"value": found.elbo.value, "se": found.elbo.se}
    assert read["sentences"] == found.sentences and len(read["khat"]) == 2


@pytest.mark.parametrize(
    "options, words",
    [
        ({"draws": 1}, "draws: expected an integer of at least 2, got 1"),
        ({"max_rows": 0}, "max_rows: expected a positive integer"),
        ({"khat_rows": -1}, "khat_rows: expected an integer of at least 0"),
        ({"x": torch.full((3, 16), 0.5)}, "x: expected pixels of 0 or 1"),
    ],
)
def test_evaluate_refuses(options, words):
    vae, x = small()
    assert isinstance(vae.likelihood, Bernoulli)
    with pytest.raises(ValueError, match=words):
        evaluate(**({"vae": vae, "x": x} | options))


# --- the page


class Page(HTMLParser):
    """Texts, tables and pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.images, self.links = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(named)
        self.links += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


HISTORY = [
    {"epoch": i, "elbo": -12.0 + i, "reconstruction": -10.0 + i, "kl": 2.0, "valid_elbo": -11.5 + i}
    | {"valid_iwae": -11.0 + i, "seconds": 0.5 * i}
    for i in (1, 2, 3)
]


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1], []])
def test_page_says_what_was_found_and_needs_nothing_beside_it(tmp_path, history):
    vae, x = small("planar")
    found = evaluate(vae, x, draws=5, khat_rows=9, khat_draws=100, refine_rows=2, refine_steps=5)
    state = torch.get_rng_state()
    path = write_page(tmp_path / "deep" / "page.html", vae, (1, 4, 4), x, found, history, {"posterior": "<planar>"})
    assert torch.equal(torch.get_rng_state(), state)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    text = " ".join(page.text)
    for sentence in found.sentences:
        assert sentence in text
    assert f"{found.elbo.value:.3f}" in text and "<planar>" in text and "<planar>" not in source
    assert "bits per dimension" not in text
    assert len(page.images) == (5 if history else 4) and all(image["alt"] for image in page.images)
    assert all(link.startswith("data:image/png;base64,") for link in page.links) and "script" not in page.tags
    again = write_page(tmp_path / "again.html", vae, (1, 4, 4), x, found, history, {"posterior": "<planar>"})
    assert again.read_text(encoding="utf-8") == source


def test_page_without_the_parts_that_were_not_asked_for(tmp_path):
    vae = build(Architecture((3, 2, 2), 1, likelihood="logistic", network_options={"hidden": (8,)}))
    x = torch.randint(0, 256, (5, 12)) / 255
    found = evaluate(vae, x, draws=2, khat_rows=0, refine_rows=0)
    settings = {"source": "<script>alert('x')</script>.npz"}
    page = Page(write_page(tmp_path / "a.html", vae, (3, 2, 2), x, found, [], settings).read_text("utf-8"))
    text = " ".join(page.text)
    assert settings["source"] in page.text and "script" not in page.tags
    assert "Not judged." in text and "No epochs were recorded." in text and "amortisation" not in text
    assert f"{found.bits.value:.3f}" in text


def test_montage_puts_channels_first_images_side_by_side():
    grey, colour = torch.arange(8.0).reshape(2, 4), torch.arange(12.0).reshape(1, 12)
    picture = montage([grey, grey[:1]], (1, 2, 2))
    assert picture.shape == (6, 6)
    assert picture[:2, 4:].tolist() == [[4, 5], [6, 7]] and picture[4:, :2].tolist() == [[0, 1], [2, 3]]
    assert math.isnan(picture[0, 2]) and math.isnan(picture[4, 4])
    assert montage([colour], (3, 2, 2))[0, 1].tolist() == [1, 5, 9]


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_images_are_written_as_picture_and_array(tmp_path, scale):
    """Twelve images in rows of ten; shades are values where these are within [0, 1], else relative to the range."""
    x = torch.rand(12, 6)
    x[0, :2] = torch.tensor([0.0, 1.0])
    array = np.load(write_images(tmp_path / "a.npy", scale * x, (1, 2, 3)))
    assert array.shape == (12, 1, 2, 3) and torch.equal(torch.as_tensor(array.reshape(12, 6)), scale * x)
    picture = imread(write_images(tmp_path / "made" / "a.PNG", scale * x, (1, 2, 3)))
    assert picture.shape[:2] == (ZOOM * (2 * 2 + GAP), ZOOM * (10 * 3 + 9 * GAP))
    last = picture[ZOOM * (2 + GAP) :: ZOOM, ZOOM * (3 + GAP) :: ZOOM, 0][:2, :3]  # the twelfth
    assert np.abs(last - x[11].reshape(2, 3).numpy()).max() < 0.01
    with pytest.raises(ValueError, match=r"path: expected a file name that ends in .png or .npy, got .*a.gif"):
        write_images(tmp_path / "a.gif", x, (1, 2, 3))


def test_page_refuses(tmp_path):
    vae, x = small()
    found = evaluate(vae, x, draws=2, khat_rows=0, refine_rows=0)
    for path, shape, words in (
        (tmp_path / "page.txt", (1, 4, 4), "path: expected a file name that ends in .html"),
        (tmp_path / "page.html", (1, 4, 5), "x: expected rows of 1 × 4 × 5 = 20 values"),
    ):
        with pytest.raises(ValueError, match=words):
            write_page(path, vae, shape, x, found, [], {})
    assert not list(tmp_path.iterdir())
