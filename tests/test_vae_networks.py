"""Likelihoods against closed forms and sums over all levels; encoders and decoders: shapes, starts, refusals."""

import math

import pytest
import torch
from scipy.integrate import quad

from vi_flows.vae.likelihoods import LIKELIHOODS, Bernoulli, Categorical, DiscretisedLogistic, Gaussian
from vi_flows.vae.networks import NETWORKS

LEVELS = torch.arange(256) / 255
SHAPES = {"mlp": (1, 1, 13), "conv": (3, 8, 12), "residual": (1, 9, 14)}


def every_level(likelihood, raw):
    """log p of each of the 256 levels, (256, n), at n pixels of raw (channels, n)."""
    return torch.stack([likelihood.log_prob(raw.T.unsqueeze(-1), level.expand(raw.shape[1], 1)) for level in LEVELS])


def logistic_raw(dtype):
    mean, log_scale = torch.meshgrid(
        torch.tensor([-400.0, -1.5, -1.0, -0.3, 0.004, 0.999, 30.0]),
        torch.tensor([-300.0, -9.0, -5.0, -1.0, 2.0, 30.0]),
        indexing="ij",
    )
    return torch.stack([mean.flatten(), log_scale.flatten()]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_levels_of_a_categorical_sum_to_one(dtype):
    for scale in (0.0, 1.0, 30.0, 3000.0):
        total = every_level(Categorical(), scale * torch.randn(256, 9, dtype=dtype)).double().logsumexp(0)
        # a log probability of 10,000 nats carries an error of as many epsilons
        assert total.abs().max() < 20 * (1 + scale) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_levels_of_a_discretised_logistic_sum_to_one(dtype):
    log_p = every_level(DiscretisedLogistic(), logistic_raw(dtype))
    assert log_p.isfinite().all() and (log_p <= 0).all()
    assert log_p.double().logsumexp(0).abs().max() < (5e-6 if dtype == torch.float32 else 1e-13)


def test_the_discretised_logistic_against_its_formula():
    """In the open, differences of sigmoids in double precision; in the tails u + log(1 − e^(v − u)), to e^u."""
    mean, log_scale = torch.tensor([-0.6, 0.0, 0.5, 1.1]).double(), torch.tensor([-3.5, -2.0, -3.5, 0.0]).double()
    got = every_level(DiscretisedLogistic(), torch.stack([mean, log_scale]))
    m, s = 127.5 * (1 + mean), 127.5 * (torch.nn.functional.softplus(log_scale + 7) - 7).exp()
    k = torch.arange(256).double().unsqueeze(-1)
    upper, lower = (k + 0.5 - m) / s, (k - 0.5 - m) / s
    upper[-1], lower[0] = math.inf, -math.inf
    plain = (upper.sigmoid() - lower.sigmoid()).log()
    near = (upper.abs().minimum(lower.abs()) < 8) & (upper != math.inf) & (lower != -math.inf)
    assert near.sum() > 400 and torch.allclose(got[near], plain[near], atol=1e-9, rtol=0)
    assert torch.allclose(got[[0, -1]].exp(), (upper.sigmoid() - lower.sigmoid())[[0, -1]], atol=1e-12, rtol=0)
    left, right = upper < -20, (lower > 20) & (upper != math.inf)
    left[0] = False  # the first level is the whole tail
    assert left.sum() > 20 and torch.allclose(got[left], (upper + (-1 / s).expm1().neg().log())[left], atol=1e-8)
    assert right.sum() > 20 and torch.allclose(got[right], (-lower + (-1 / s).expm1().neg().log())[right], atol=1e-8)


def test_far_tails_of_the_discretised_logistic_in_single_precision():
    single, double = logistic_raw(torch.float32), logistic_raw(torch.float32).double()
    ours, theirs = every_level(DiscretisedLogistic(), single), every_level(DiscretisedLogistic(), double)
    assert theirs.min() < -1e4
    assert torch.allclose(ours.double(), theirs, rtol=2e-5, atol=1e-4)


def test_bernoulli_and_gaussian_against_torch():
    logits, x = 3 * torch.randn(4, 5, 1, 7).double(), torch.bernoulli(torch.full((5, 7), 0.4)).double()
    expected = torch.distributions.Bernoulli(logits=logits[..., 0, :]).log_prob(x).sum(-1)
    assert torch.allclose(Bernoulli().log_prob(logits, x), expected)
    raw, x = torch.randn(4, 5, 2, 7).double(), 100 + 20 * torch.randn(5, 7).double()
    sd = 20 * (torch.nn.functional.softplus(raw[..., 1, :] + 7) - 7).exp()
    normal = torch.distributions.Normal(100 + 20 * raw[..., 0, :], sd)
    assert torch.allclose(Gaussian(100.0, 20.0).log_prob(raw, x), normal.log_prob(x).sum(-1))
    assert torch.allclose(Gaussian(100.0, 20.0).mean(raw), normal.mean)


def test_a_categorical_against_torch():
    raw, level = 5 * torch.randn(3, 4, 256, 7).double(), torch.randint(0, 256, (4, 7))
    expected = torch.distributions.Categorical(logits=raw.movedim(-2, -1)).log_prob(level).sum(-1)
    assert torch.allclose(Categorical().log_prob(raw, level.double() / 255), expected)


def test_a_gaussian_integrates_to_one_and_its_sd_is_bounded_below():
    raw = torch.tensor([[0.2], [-1.0]]).double()
    density = lambda x: float(Gaussian().log_prob(raw, torch.tensor([x]).double()).exp())  # noqa: E731
    assert quad(density, -8, 8, points=[0.2])[0] == pytest.approx(1, abs=1e-7)
    peak = Gaussian().log_prob(torch.tensor([[0.2], [-1e4]]), torch.tensor([0.2]))
    assert peak.item() == pytest.approx(7 - 0.5 * math.log(2 * math.pi), abs=1e-5)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_stay_finite_at_extreme_raw_values(name):
    likelihood = LIKELIHOODS[name]()
    extremes = torch.tensor([-1e6, -1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4, 1e6])
    pairs = torch.cartesian_prod(extremes, extremes)
    raw = torch.zeros(likelihood.channels, len(pairs))
    raw[0], raw[-1] = pairs[:, 0], pairs[:, 1]
    for x in (0.0, 1.0, *([] if name == "bernoulli" else [128 / 255])):
        leaf = raw.clone().requires_grad_()
        log_p = likelihood.log_prob(leaf.T.unsqueeze(-1), torch.full((len(pairs), 1), x))
        (gradient,) = torch.autograd.grad(log_p.sum(), leaf)
        assert log_p.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_share_images(name):
    """raw may have draws in front, (K, N), of rows x (N); half precision is summed in single."""
    likelihood = LIKELIHOODS[name]()
    raw, x = torch.randn(3, 4, likelihood.channels, 5), torch.bernoulli(torch.full((4, 5), 0.5))
    got = likelihood.log_prob(raw, x)
    assert got.shape == (3, 4) and likelihood.log_prob(raw[:0], x).shape == (0, 4)
    assert torch.equal(got[1], likelihood.log_prob(raw[1], x))
    assert likelihood.mean(raw).shape == likelihood.sample(raw).shape == (3, 4, 5)
    half = likelihood.log_prob(raw.bfloat16(), x)
    assert half.dtype == torch.float32
    assert torch.allclose(half, likelihood.log_prob(raw.bfloat16().float(), x))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_samples_follow_the_likelihood(name):
    """Means within 4.5 standard errors, and for levels the frequencies too (χ² within 5 sd of its own mean)."""
    likelihood, n = LIKELIHOODS[name](), 20_000
    raw = torch.randn(likelihood.channels, 6).double()
    if likelihood.channels == 2:
        raw[1] -= 1  # narrower than the range of the levels
    draws = likelihood.sample(raw.expand(n, *raw.shape))
    likelihood.check(draws, "draws")
    assert ((draws.mean(0) - likelihood.mean(raw)).abs() < 4.5 * draws.std(0) / n**0.5).all()
    if likelihood.levels == 256:
        p = every_level(likelihood, raw).exp()
        assert torch.allclose((p * LEVELS.double().unsqueeze(-1)).sum(0), likelihood.mean(raw), atol=1e-6)
        counts = (draws.unsqueeze(0) * 255).round().long().squeeze(0)
        for pixel in range(6):
            often = n * p[:, pixel] > 5
            seen = torch.bincount(counts[:, pixel], minlength=256)[often]
            chi2 = ((seen - n * p[often, pixel]).square() / (n * p[often, pixel])).sum()
            cells = int(often.sum())
            assert abs(chi2 - cells) < 5 * (2 * cells) ** 0.5 + 2


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("bernoulli", [0.0, 0.5], "rows: expected pixels of 0 or 1 for the Bernoulli likelihood, got 0.5; binarise"),
        ("bernoulli", [0.0, math.nan], "got nan; binarise"),
        ("categorical", [0.0, 0.3001], "rows: expected pixels of k/255, .* categorical likelihood, got 0.3001; give"),
        ("categorical", [0.0, 256 / 255], "got 1.00392; give bytes"),
        ("logistic", [-1 / 255], "rows: expected pixels of k/255, .* logistic likelihood, got -0.00392157; give"),
        ("logistic", [math.nan], "got nan; give bytes"),
        ("gaussian", [0.0, math.inf], "rows: expected finite numbers for the Gaussian likelihood, got inf; leave"),
    ],
)
def test_values_out_of_range_are_refused(name, x, message):
    with pytest.raises(ValueError, match=message) as error:
        LIKELIHOODS[name]().check(torch.tensor(x), "rows")
    assert "\n" not in str(error.value)


def test_values_in_range_are_not():
    LIKELIHOODS["bernoulli"]().check(torch.tensor([0.0, 1.0]), "rows")
    LIKELIHOODS["categorical"]().check(LEVELS, "rows")
    LIKELIHOODS["logistic"]().check(LEVELS.double(), "rows")
    LIKELIHOODS["gaussian"]().check(torch.tensor([-1e9, 1e9]), "rows")


def test_a_wrong_number_of_raw_numbers_is_refused():
    with pytest.raises(ValueError, match=r"raw: expected \(2, 7\) numbers an image, got \(1, 7\); check the decoder"):
        Gaussian().log_prob(torch.zeros(3, 1, 7), torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"raw: expected \(1, 1\) numbers"):
        Bernoulli().log_prob(torch.zeros(3, 1, 7), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="spread: expected a positive number, got 0"):
        Gaussian(1.0, 0.0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 2, 256])
def test_shapes_for_any_batch(name, channels):
    shape = SHAPES[name]
    dim = math.prod(shape)
    encoder, decoder = NETWORKS[name](shape, 5, channels, 0.2, 0.4)
    assert encoder.context == {"mlp": 256, "conv": 256, "residual": 450}[name]
    for batch in [(), (0,), (2,), (2, 3)]:
        assert encoder(torch.rand(*batch, dim)).shape == (*batch, encoder.context)
        assert decoder(torch.randn(*batch, 5)).shape == (*batch, channels, dim)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 28, 20)])
@pytest.mark.parametrize("name", ["conv", "residual"])
def test_convolutions_of_the_usual_images(name, shape):
    """The sizes in between, too: after two strides 7 × 7 or 7 × 5, after three 4 × 4 or 4 × 3."""
    encoder, decoder = NETWORKS[name](shape, 64, 1, 0.1, 0.3)
    sizes = []
    layers = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[-2:]))) for m in layers]
    encoder(torch.rand(2, math.prod(shape)))
    for hook in hooks:
        hook.remove()
    last = {"conv": (7, shape[2] // 4), "residual": (4, -(-shape[2] // 8))}[name]
    assert last in sizes and min(sizes) == ((1, 1) if name == "conv" else last)
    assert decoder(torch.randn(2, 64)).shape == (2, 1, math.prod(shape))


def test_the_gated_pair_has_the_published_layers():
    encoder, decoder = NETWORKS["conv"]((1, 28, 28), 64, 1, 0.0, 1.0)
    weights = [tuple(p.shape) for p in encoder.parameters() if p.dim() == 4]
    maps = [(1, 32, 5), (32, 32, 5), (32, 64, 5), (64, 64, 5), (64, 64, 5), (64, 256, 7)]
    assert weights == [(2 * after, before, k, k) for before, after, k in maps]
    mirrored = [(64, 64, 7), (64, 64, 5), (64, 32, 5), (32, 32, 5), (32, 32, 5), (32, 32, 5)]
    weights = [tuple(p.shape) for p in decoder.parameters() if p.dim() == 4]
    assert weights == [*((before, 2 * after, k, k) for before, after, k in mirrored), (1, 32, 1, 1)]


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_do_not_mix_and_pixels_keep_their_place(name):
    shape = SHAPES[name]
    dim = math.prod(shape)
    encoder, decoder = (net.double() for net in NETWORKS[name](shape, 5, 2, 0.2, 0.4))
    x, z = torch.rand(3, dim).double(), torch.randn(3, 5).double()
    assert torch.allclose(encoder(x)[1], encoder(x[1]))
    assert torch.allclose(decoder(z)[1], decoder(z[1]))
    if name != "mlp":  # a convolution moves with its image: the last layer's map is (channels, C, H, W) in order
        image = decoder.layers(z).unflatten(1, (2, shape[0])).flatten(2)
        assert torch.equal(image, decoder(z))


def test_pixels_are_standardised_by_buffers():
    encoder, _ = NETWORKS["mlp"]((1, 1, 6), 2, 1, 10.0, 4.0)
    plain, _ = NETWORKS["mlp"]((1, 1, 6), 2, 1, 0.0, 1.0)
    state = encoder.state_dict()
    assert state["centre"] == 10 and state["spread"] == 4
    plain.layers.load_state_dict(encoder.layers.state_dict())
    x = torch.randn(5, 6)
    assert torch.allclose(encoder(10 + 4 * x), plain(x), atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_at_the_start_outputs_depend_on_inputs(name):
    """Across rows, contexts and raw numbers vary by .02 to 5; every parameter has a gradient."""
    shape = (1, 28, 28)
    encoder, decoder = NETWORKS[name](shape, 64, 1, 0.5, 0.3)
    h, raw = encoder(torch.rand(16, 784)), decoder(torch.randn(16, 64))
    assert 0.02 < h.std(0).mean() < 5 and 0.02 < raw.std(0).mean() < 5
    (h.square().sum() + raw.square().sum()).backward()
    for net in (encoder, decoder):
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pair_learns_to_copy_images(name):
    """Bars on 8 × 8 pixels through a context: 150 steps take the squared error below a quarter of the variance."""
    bars = torch.eye(8).repeat_interleave(8, 0).reshape(8, 8, 8)
    x = torch.cat([bars.reshape(8, 64), bars.mT.reshape(8, 64)])
    options = {"conv": {"filters": 8, "hidden": 32}, "residual": {"hidden": 32}, "mlp": {}}[name]
    encoder, decoder = NETWORKS[name]((1, 8, 8), 16, 1, x.mean().item(), x.std().item(), **options)
    head = torch.nn.Linear(encoder.context, 16)
    parameters = [*encoder.parameters(), *head.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, 2e-3)
    for _ in range(150):
        loss = (decoder(head(encoder(x)))[:, 0] - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < x.var().item() / 4


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("conv", (1, 28, 21), {}, "shape: expected height and width to be multiples of 4, got 28 × 21; take network="),
        ("conv", (1, 1, 560), {}, "multiples of 4, got 1 × 560"),
        ("residual", (1, 1, 560), {}, "shape: expected height and width of at least 8 for 3 stages, got 1 × 560; take"),
        ("mlp", (28, 28), {}, r"shape: expected \(colours, height, width\), got \(28, 28\); such as"),
        ("mlp", (1, 0, 28), {}, r"got \(1, 0, 28\)"),
        ("mlp", (1, 1, 9), {"hidden": ()}, r"hidden: expected a sequence of positive widths, got \(\); such as"),
        ("mlp", (1, 1, 9), {"decoder_hidden": (10, 0)}, "decoder_hidden: expected a positive integer, got 0"),
        ("mlp", (1, 1, 9), {"latent": 0}, "latent: expected a positive integer, got 0"),
        ("conv", (1, 8, 8), {"filters": 1.5}, "filters: expected a positive integer, got 1.5"),
        ("residual", (1, 8, 8), {"blocks": 0}, "blocks: expected a positive integer, got 0"),
        (
            "residual",
            (1, 8, 8),
            {"spread": 0.0},
            "spread: expected a positive number, got 0.0 about 0.5; check the data",
        ),
        ("mlp", (1, 8, 8), {"centre": math.nan}, "got 1.0 about nan; check the data"),
    ],
)
def test_what_networks_refuse(name, shape, options, message):
    arguments = {"latent": 4, "channels": 1, "centre": 0.5, "spread": 1.0} | options
    with pytest.raises(ValueError, match=message) as error:
        NETWORKS[name](shape, **arguments)
    assert "\n" not in str(error.value)
