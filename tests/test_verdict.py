"""The verdict's rule: hidden tails, precision, attempts, local moves, unseen basins, improper directions."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

import vi_flows as vf
from vi_flows.flows.bases import StandardNormal
from vi_flows.flows.distribution import Flow
from vi_flows.flows.layers.linear import LowerTriangular
from vi_flows.flows.parameters import Fixed
from vi_flows.inference import bounds
from vi_flows.inference.estimate.psis import hidden, khat, khat_upper, tail_size
from vi_flows.inference.estimate.quantities import estimate
from vi_flows.inference.estimate.weights import Weights, log_mean
from vi_flows.inference.judge import checks, probing
from vi_flows.inference.judge.proposal import DefensiveProposal
from vi_flows.inference.judge.propriety import FAR, far_shares
from vi_flows.inference.judge.verdict import FIRST_DRAWS, judge
from vi_flows.inference.locate.gaussian import Gaussians, Kind, Origin
from vi_flows.running import Clock, seeded
from vi_flows.testing.synthetic import FunnelBijection, synthetic

LOG_2PI = math.log(2 * math.pi)


def gaussian_flow(dim: int, scale: float = 1.0, shift: float = 0.0) -> Flow:
    loc = torch.full((dim,), shift, dtype=torch.float64)
    tril = scale * torch.eye(dim, dtype=torch.float64)
    return Flow([Fixed(LowerTriangular, shift=loc, scale_tril=tril)], StandardNormal(dim)).double()


def log_normal(x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    scale = torch.as_tensor(scale, dtype=x.dtype).expand(x.shape)
    return (-0.5 * (x / scale).square() - scale.log() - 0.5 * LOG_2PI).sum(-1)


def normal(dim: int) -> vf.LogDensity:
    return vf.LogDensity(log_normal, dim=dim)


def funnel(dim: int) -> vf.LogDensity:
    def log_p(x):
        return log_normal(x[:, :1], 2.0) + log_normal(x[:, 1:], (x[:, :1] / 2).exp())

    return vf.LogDensity(log_p, dim=dim)


def funnel_draws(n: int, dim: int) -> torch.Tensor:
    neck = 2 * torch.randn(n, 1, dtype=torch.float64)
    return torch.cat([neck, (neck / 2).exp() * torch.randn(n, dim - 1, dtype=torch.float64)], -1)


def funnel_flow(dim: int) -> Flow:
    """The flow that straightens it."""
    return Flow([Fixed(FunnelBijection, scale=torch.tensor([2.0], dtype=torch.float64))], StandardNormal(dim)).double()


def exact_weights(target: vf.LogDensity, x: torch.Tensor) -> Weights:
    """Draws that all weigh the same."""
    log_p = target.log_prob(x)
    return Weights(x, log_p, log_p)


def pareto_weights(shape: float, share: float, draws: int, generator: torch.Generator) -> torch.Tensor:
    """log of 1 + a generalised Pareto excess of that shape, which a share of the draws has: of mean 1 + share/(1−k)."""
    u = 1 - torch.rand(draws, dtype=torch.float64, generator=generator)
    drawn = torch.rand(draws, dtype=torch.float64, generator=generator) < share
    return torch.log1p(drawn * (u**-shape - 1) / shape)


def named(verdict) -> dict[str, checks.Check]:
    return {check.name: check for check in verdict.checks}


# hidden tails


@pytest.mark.parametrize("shape", [0.2, 0.6, 0.9])
def test_hidden_share_of_a_pareto_tail_is_its_integral(shape):
    """Weights at the quantiles of t^(−k): beyond the 1 − 1/S quantile lies S^(k−1) of the integral."""
    draws = 40_000
    t = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    log_w = -shape * t.log() + math.log((1 - shape) / draws)
    assert hidden(log_w, shape) == pytest.approx(draws ** (shape - 1), rel=0.02)
    shuffled = log_w[torch.randperm(draws)]
    assert hidden(shuffled, shape) == pytest.approx(hidden(log_w, shape))
    dead = torch.cat([log_w, torch.full((5000,), -math.inf)])
    assert hidden(dead, shape) == pytest.approx(hidden(log_w, shape))
    assert hidden(log_w + 1, shape) == pytest.approx(math.e * hidden(log_w, shape))


def test_hidden_share_grows_with_the_shape_and_has_no_end_from_1_on():
    log_w = pareto_weights(0.5, 0.1, 10_000, torch.Generator().manual_seed(0)).log_softmax(0)
    shares = [hidden(log_w, k) for k in (-0.5, 0.0, 0.3, 0.6, 0.9, 0.99)]
    assert shares == sorted(shares) and shares[0] > 0
    assert hidden(log_w, 1.0) == hidden(log_w[:4], 0.3) == math.inf


@pytest.mark.parametrize("share", [1.0, 0.05])
@pytest.mark.parametrize("shape", [0.7, 0.85])
def test_hidden_share_bounds_the_error_of_heavy_weights_in_most_repeats(shape, share):
    """Generalised Pareto weights of known mean: the share at the upper limit of k̂ against the error of log Ẑ."""
    generator, draws, repeats = torch.Generator().manual_seed(1), 20_000, 20
    bounded, passed = 0, []
    for _ in range(repeats):
        log_w = pareto_weights(shape, share, draws, generator)
        error = abs(log_mean(log_w) - math.log(1 + share / (1 - shape)))
        check = checks.tails(log_w)
        assert check.passed == (check.statistic < checks.UNSEEN)
        bounded += check.statistic > error
        passed += [error] * check.passed
    assert bounded >= 0.7 * repeats
    assert max(passed, default=0.0) < 0.1


def test_a_small_heavy_tail_passes_where_a_large_one_of_the_same_shape_does_not():
    """A shape alone cannot tell: 1 % of the weights with a tail of 0.75, or all of them."""
    found = {}
    for share in (1.0, 0.002):
        generator = torch.Generator().manual_seed(2)
        log_w = [pareto_weights(0.75, share, 160_000, generator) for _ in range(10)]
        found[share] = sum(checks.tails(row).passed for row in log_w)
        assert sum(khat_upper(khat(row), len(row)) > 0.7 for row in log_w) >= (9 if share == 1 else 1)
    assert found[1.0] == 0 and found[0.002] >= 8


def test_unseen_moments_are_those_of_the_terms_that_make_them():
    """Weights of t₃ draws under a t₅: h² has the heavier tail; of constant weights and normal draws nothing hides."""
    with seeded(3):
        x = torch.distributions.StudentT(5.0).sample((40_000, 1)).double()
    log_w = torch.distributions.StudentT(3.0).log_prob(x)[:, 0] - torch.distributions.StudentT(5.0).log_prob(x)[:, 0]
    log_w = log_w.log_softmax(0)
    values = estimate(x, log_w)
    first, second = checks.unseen_moments(x, values, log_w, len(x)).tolist()
    assert 0 < first[0] < second[0]
    terms = log_w + ((x - values.mean) / values.sd).abs().log()[:, 0]
    assert first[0] == pytest.approx(hidden(terms, khat_upper(khat(terms), len(x))))
    with seeded(4):
        x = torch.randn(40_000, 2, dtype=torch.float64)
    even = torch.full((40_000,), -math.log(40_000), dtype=torch.float64)
    assert float(checks.unseen_moments(x, estimate(x, even), even, len(x)).max()) < 0.002


# precision, sds, attempts


def test_precision_asks_for_some_seven_thousand_draws():
    """Equal weights: se² = p(1 − p)/n, at p = .5 below .006 from n = 6,945 on."""
    with seeded(5):
        x = torch.randn(7500, 1, dtype=torch.float64)
    check = [checks.precision(["x"], estimate(x[:n], torch.zeros(n, dtype=torch.float64))) for n in (6500, 7500)]
    assert [c.passed for c in check] == [False, True]
    assert check[0].statistic == pytest.approx(math.sqrt(0.25 / 6500) / 0.006, rel=1e-3)


def test_errors_of_probabilities_count_equal_draws_together():
    """Against Σ w̄² (1[θ ≤ q] − P)² for a quantity of few values."""
    with seeded(13):
        x, log_w = torch.randint(0, 5, (500, 30)).double(), torch.randn(500, dtype=torch.float64)
    found, w = estimate(x, log_w), log_w.softmax(0)
    below = (x <= found.quantiles[:, None]).double()
    error = (w.square()[:, None] * (below - (w @ below)[:, None]).square()).sum(1).sqrt()
    assert torch.allclose(found.probability_se, error, atol=1e-12)


def test_sds_that_tails_leave_open_are_named_and_left_out_of_the_claim():
    """A t of 3 degrees of freedom, whose fourth moment is infinite, beside a normal: only its own sd is left out."""
    law = torch.distributions.StudentT(3.0)
    target = vf.LogDensity(lambda x: law.log_prob(x[:, 0]) + log_normal(x[:, 1:]), dim=2)
    with seeded(6):
        verdict = judge(gaussian_flow(2), target).verdict
    check = named(verdict)["sds"]
    assert not check.passed and check.statistic >= checks.LOG_SD
    assert "x[0]" in check.sentence and "x[1]" not in check.sentence
    assert verdict.status == "corrected" and check.sentence in verdict.reasons


def test_attempts_share_the_error():
    for multiple in (checks.UPPER, checks.TWO):
        assert checks.stricter(multiple, 1) == pytest.approx(multiple)
        error = [1 - NormalDist().cdf(checks.stricter(multiple, i)) for i in (1, 2, 3)]
        assert error[1] == pytest.approx(error[0] / 2) and error[2] == pytest.approx(error[0] / 4)
    log_w = pareto_weights(0.6, 0.1, 40_000, torch.Generator().manual_seed(3))
    upper = khat_upper(khat(log_w), len(log_w), checks.stricter(checks.UPPER, 2))
    assert upper == pytest.approx(khat(log_w) + 1.645 * (1 + khat(log_w)) / math.sqrt(tail_size(40_000)), abs=1e-3)


def test_a_later_attempt_is_judged_more_strictly():
    law = torch.distributions.StudentT(3.0)
    target = vf.LogDensity(lambda x: law.log_prob(x).sum(-1), dim=1)
    first, third = (_judged(gaussian_flow(1), target, attempt=i) for i in (1, 3))
    assert named(first)["precision"] == named(third)["precision"]
    for name in ("tails", "tails of means", "mass outside q", "divergence"):
        assert named(third)[name].statistic > named(first)[name].statistic


def _judged(flow, target, seed=7, **options):
    with seeded(seed):
        return judge(flow, target, **options).verdict


# when judging ends


def judged(flow, target, **options):
    with seeded(3):
        return judge(flow, target, num_draws=1000, **options)


def test_draws_are_doubled_where_that_mends():
    """A flow 1.35 times too wide in 22 dimensions: weights have an ESS of (√2.645/1.8225)²² = 8 % of the draws."""
    found = judged(gaussian_flow(22, 1.35), normal(22))
    assert len(found.proposal.x) > FIRST_DRAWS and found.verdict.status != "unreliable"
    assert len(judged(gaussian_flow(22, 1.05), normal(22)).proposal.x) == FIRST_DRAWS


def test_judging_ends_where_no_doubling_mends():
    """A flow 2 units off in each of 22 dimensions: a few draws carry all the weight, whatever their number."""
    found = judged(gaussian_flow(22, 1.0, shift=2.0), normal(22), modes=None)
    assert len(found.proposal.x) == FIRST_DRAWS and found.verdict.status == "unreliable"
    assert {"tails", "precision"} <= set(named(found.verdict)) and "tails of means" not in named(found.verdict)


@pytest.mark.parametrize(("shape", "mends"), [(0.3, True), (0.95, False)])
def test_a_tail_that_more_draws_cannot_mend(shape, mends):
    log_w = pareto_weights(shape, 1.0, 40_000, torch.Generator().manual_seed(4)).log_softmax(0)
    precise = [checks.Check("precision", r, 1.0, r < 1, "") for r in (0.5, 3.9, 4.1)]
    assert [checks._mendable(log_w, check, 4.0) for check in precise] == [mends, mends, False]


def test_no_claim_where_time_runs_out():
    """With all the time as without a limit; with none left a good fit is not claimed, and the check says why."""
    assert judged(gaussian_flow(2), normal(2), clock=Clock(600.0)).verdict.status == "reliable"
    found = judged(gaussian_flow(2), normal(2), clock=Clock(1e-3))
    assert found.verdict.status == "unreliable" and len(found.flow_draws) == len(found.log_weights)
    assert "max_seconds" in named(found.verdict)["time"].sentence
    spent = Clock(600.0)
    spent.limit = time.monotonic() - spent.began + 0.3  # enough for draws, not for moves
    slow = vf.LogDensity(lambda x: time.sleep(1e-3) or log_normal(x), dim=2)
    assert judged(gaussian_flow(2), slow, clock=spent).verdict.status == "unreliable"


# local moves


def test_local_moves_leave_draws_of_the_target_as_they_are():
    """A funnel in 30 dimensions (60 shifts are looked at), and a normal whose flow is too wide."""
    target = funnel(30)
    with seeded(8):
        found = probing.local_moves(
            DefensiveProposal(gaussian_flow(30), None), target, exact_weights(target, funnel_draws(4000, 30))
        )
    assert found.passed, found.sentence
    check = named(_judged(gaussian_flow(3, 1.2), normal(3)))["local moves"]
    assert check.passed and check.statistic < 1


def test_local_moves_find_the_neck_that_all_draws_missed():
    """Draws of a funnel without its neck, all of the same weight: nothing in the weights tells."""
    target = funnel(5)
    with seeded(9):
        x = funnel_draws(8000, 5)
        pooled = exact_weights(target, x[x[:, 0] > -1.5])
        found = probing.local_moves(DefensiveProposal(funnel_flow(5), None), target, pooled)
    assert not found.passed and found.statistic > 1
    assert "x[0]" in found.sentence and "missed" in found.sentence


def test_a_shift_is_compared_with_its_noise_and_with_how_far_moves_went():
    """Independent draws after each move; then half-way: ρ = √.75, and a shift of .1 tells .1/(1 − ρ)."""
    with seeded(10):
        before, after = torch.randn(2, 2000, 50, dtype=torch.float64)
    ratio, error = probing._shifts(before, after)
    assert ratio.shape == error.shape == (100,) and float(ratio.max()) < 1
    ratio, error = probing._shifts(before, torch.cat([after[:, :1] + 0.2, 1.2 * after[:, 1:2], after[:, 2:]], -1))
    assert float(ratio[0]) > 1 and float(error[0]) == pytest.approx(-0.2, abs=0.07)
    assert float(ratio[51]) > 1 and int((ratio > 1).sum()) == 2
    kept = 0.75**0.5
    ratio, error = probing._shifts(before[:, :1], kept * before[:, :1] + 0.5 * after[:, :1] + 0.1)
    assert float(ratio[0]) > 1 and float(error[0]) == pytest.approx(-0.1 / (1 - kept), abs=0.2)
    ratio, _ = probing._shifts(before, before)
    assert float(ratio.max()) == 0


# unseen basins, symmetric modes


def two_modes(distance: float, share: float) -> vf.LogDensity:
    def log_p(x):
        other = log_normal(x - distance) + math.log(share)
        return torch.logaddexp(log_normal(x) + math.log(1 - share), other)

    return vf.LogDensity(log_p, dim=2)


def at(*points: float, scale: float = 1.0) -> Gaussians:
    loc = torch.tensor(points, dtype=torch.float64)[:, None].expand(-1, 2)
    tril = scale * torch.eye(2, dtype=torch.float64).expand(len(points), 2, 2)
    return Gaussians(loc.clone(), tril.clone(), (Origin(Kind.FRESH),) * len(points))


@pytest.mark.parametrize(("share", "found"), [(0.3, True), (0.001, False)])
def test_a_basin_that_no_draw_has_seen_is_told_if_it_matters(share, found):
    probes = at(0.0, 30.0, 0.1, 30.0)
    verdict = _judged(gaussian_flow(2), two_modes(30.0, share), modes=at(0.0), probes=probes)
    check = named(verdict)["unseen basins"]
    assert check.passed == (not found)
    if found:
        assert verdict.status == "unreliable"
        assert "of 4 fresh starts some led to mass" in check.sentence and "(30, 30)" in check.sentence
        assert "local moves" not in named(verdict)
    else:
        assert verdict.status == "reliable" and f"{1 - 0.05**0.25:.1%} of starts" in check.sentence


def test_a_basin_that_the_proposal_covers_is_no_news():
    verdict = _judged(gaussian_flow(2), two_modes(30.0, 0.3), modes=at(0.0, 30.0), probes=at(0.0, 30.0))
    assert named(verdict)["unseen basins"].passed
    assert verdict.status == "corrected" and "missed basins hold less than" in " ".join(verdict.reasons)


def test_sixty_four_starts_bound_missed_basins_by_five_percent():
    target = normal(2)
    with seeded(11):
        pooled = exact_weights(target, torch.randn(1000, 2, dtype=torch.float64))
    check = probing.unseen_basins(DefensiveProposal(gaussian_flow(2), None), target, pooled, at(*[0.0] * 64))
    assert "4.6% of starts" in check.sentence


def test_proposal_scores_any_point_as_it_scores_its_draws():
    proposal = DefensiveProposal(synthetic("banana", 3, dim=3).flow, None)
    with seeded(12):
        x, log_m, _, _ = proposal.draw(500)
    assert torch.allclose(proposal.log_prob(x), log_m, atol=1e-6)


def test_symmetric_modes_are_named():
    loc = torch.tensor([[1.0, 4.0], [4.0, 1.0], [-1.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    modes = Gaussians(loc, 0.3 * torch.eye(2, dtype=torch.float64).expand(4, 2, 2).clone(), (Origin(Kind.END),) * 4)

    def log_p(x, heights):
        return (log_normal((x[:, None] - loc) / 0.3) + heights).logsumexp(-1)

    even = vf.LogDensity(lambda x: log_p(x, torch.zeros(4, dtype=torch.float64)), dim=2)
    assert probing.symmetric_modes(even, modes).startswith("3 modes are permutations or sign flips of each other")
    uneven = vf.LogDensity(lambda x: log_p(x, torch.arange(4, dtype=torch.float64)), dim=2)
    assert probing.symmetric_modes(uneven, modes) == ""


# improper directions


def plateau(height: float) -> vf.LogDensity:
    """A normal over a plateau without end along x[0], of log height beneath the normal's."""

    def log_p(x):
        flat = torch.full_like(x[:, 0], height)
        return torch.logaddexp(log_normal(x[:, :1]), flat) + log_normal(x[:, 1:])

    return vf.LogDensity(log_p, dim=3)


def test_a_plateau_too_low_for_any_draw_to_weigh_is_still_improper():
    """e⁻²⁰ of the normal's height: all else passes."""
    verdict = _judged(gaussian_flow(3), plateau(-20.0))
    failed = [check for check in verdict.checks if not check.passed]
    assert verdict.status == "unreliable" and [check.name for check in failed] == ["proper"]
    assert "x[0]" in failed[0].sentence and "improper" in failed[0].sentence


def test_a_plateau_along_a_combination_is_improper():
    """As above along (3, 0, −4)/5, between two other scales; only its normal part is seen by draws."""
    basis = torch.tensor([[3.0, 0.0, -4.0], [4.0, 0.0, 3.0], [0.0, 5.0, 0.0]]).double() / 5
    scales = torch.tensor([1.0, 0.5, 2.0]).double()

    def log_p(x):
        z = x @ basis.mT
        flat = torch.full_like(x[:, 0], -20.0)
        return torch.logaddexp(log_normal(z[:, :1], scales[:1]), flat) + log_normal(z[:, 1:], scales[1:])

    tril = (basis.mT * scales)[None]
    mode = Gaussians(torch.zeros(1, 3).double(), torch.linalg.cholesky(tril @ tril.mT), (Origin(Kind.FRESH),))
    flow = Flow([Fixed(LowerTriangular, shift=mode.loc[0], scale_tril=mode.scale_tril[0])], StandardNormal(3)).double()
    verdict = _judged(flow, vf.LogDensity(log_p, dim=3), modes=mode)
    failed = [check for check in verdict.checks if not check.passed]
    assert verdict.status == "unreliable" and [check.name for check in failed] == ["proper"]
    assert "along 0.80 x[2] − 0.60 x[0], hold" in failed[0].sentence


@pytest.mark.parametrize("df", [1.0, 3.0])
def test_heavy_but_proper_tails_are_not_called_improper(df):
    law = torch.distributions.StudentT(df)
    target = vf.LogDensity(lambda x: law.log_prob(x).sum(-1), dim=2)
    for seed in range(5):
        with seeded(seed):
            check = probing.proper(target, exact_weights(target, law.sample((4000, 2)).double()))
        assert check.passed and check.statistic < 0.01, check.sentence


def test_far_share_is_the_mass_far_out():
    """Of a Cauchy law, from the line through its centre: P(|x| > FAR · reach) = 1 − (2/π) atan(FAR · reach)."""
    law = torch.distributions.Cauchy(0.0, 1.0)
    target = vf.LogDensity(lambda x: law.log_prob(x).sum(-1), dim=1)
    shares = far_shares(target, torch.zeros(1, 1).double(), torch.tensor([[1.0], [5.0]]).double())
    exact = [1 - 2 / math.pi * math.atan(FAR * reach) for reach in (1.0, 5.0)]
    assert shares.tolist() == pytest.approx(exact, rel=0.05)


def test_a_hierarchy_without_a_maximum_is_proper():
    """Its density has no bound along log tau → −∞."""
    target = funnel(6)
    with seeded(14):
        check = probing.proper(target, exact_weights(target, funnel_draws(4000, 6)))
    assert check.passed, check.sentence


def test_every_bound_says_what_a_user_loses_and_the_readme_quotes_them():
    table = bounds.table()
    assert len(table) > 35 and all(unit and loses and origin for _, _, unit, loses, origin in table)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    rule = readme[readme.index("The rule asks") : readme.index("**Corrections.**")].replace("\n", " ")
    for words in (
        f"less than {100 * bounds.UNSEEN:g} % of the integral and move no mean by {bounds.MEAN_UNSEEN:g} sd",
        f"below {bounds.MEAN_SE:g} sd for means",
        f"told to {bounds.ROUNDED:g} nats",
        f"agree on the evidence to {bounds.MISSING_MASS:g}",
        f"below {bounds.DIVERGENCE:g}",
        f"means to {bounds.SHIFT:g} sd, probabilities to {bounds.ENDS_SHIFT:g} or {bounds.MEDIAN_SHIFT:g}",
    ):
        assert words in rule, words
