"""Annealed corrections against closed forms: evidence, draws, what stays frozen, what is refused."""

import dataclasses
import json
import math
import time
from functools import partial

import pytest
import torch

import vi_flows as vf
from vi_flows.flows.layers.linear import LowerTriangular
from vi_flows.flows.parameters import Fixed
from vi_flows.inference.correct import anneal as correct
from vi_flows.inference.correct import smc as annealing
from vi_flows.inference.correct.draws import bridge, quantities_of, replicate_se, with_errors
from vi_flows.inference.estimate.quantities import estimate
from vi_flows.inference.estimate.weights import Weights, log_mean
from vi_flows.inference.judge.check import Check, Role
from vi_flows.inference.judge.proposal import DefensiveProposal
from vi_flows.inference.locate.gaussian import Gaussians, Kind, Origin
from vi_flows.progress import Progress
from vi_flows.running import Clock

LOG_2PI = math.log(2 * math.pi)
FEW = {"particles": 400, "replicates": 4}
TAILS = Check("tails", 1.0, 0.02, False, "a few draws carry the estimates")


def gaussian_flow(loc, tril):
    """The exact law N(loc, tril trilᵀ) as a flow."""
    loc, tril = (torch.as_tensor(value, dtype=torch.float64) for value in (loc, tril))
    base = vf.bases.StandardNormal(len(loc)).double()
    return vf.Flow([Fixed(LowerTriangular, shift=loc, scale_tril=tril)], base).requires_grad_(False)


def gaussian(loc, sd, log_z):
    """exp(log_z) N(loc, diag(sd²))."""
    loc, sd = torch.tensor(loc, dtype=torch.float64), torch.tensor(sd, dtype=torch.float64)

    def log_p(x):
        return log_z - 0.5 * ((x - loc) / sd).square().sum(-1) - sd.log().sum() - 0.5 * len(loc) * LOG_2PI

    return vf.LogDensity(log_p, dim=len(loc))


def two_modes(x):
    """0.3 N(−6, 1) + 0.7 N(6, 1) in the first of two coordinates, times e²."""
    parts = [math.log(0.3) - 0.5 * (x[:, 0] + 6).square(), math.log(0.7) - 0.5 * (x[:, 0] - 6).square()]
    return 2 + torch.stack(parts).logsumexp(0) - 0.5 * x[:, 1].square() - LOG_2PI


def half_plane(x):
    """The half x₀ < 2 of N((2, 0), I), density 0 elsewhere: ∫p = 1/2."""
    log_p = -0.5 * ((x[:, 0] - 2).square() + x[:, 1].square()) - LOG_2PI
    return torch.where(x[:, 0] < 2, log_p, -torch.inf)


@pytest.fixture(scope="module")
def wrong():
    """A Gaussian target in three coordinates, judged by a flow that is shifted, too narrow and uncorrelated."""
    target = gaussian([1.0, -2.0, 0.5], [1.0, 2.0, 0.3], 3.0)
    flow = gaussian_flow([0.0, 0.0, 0.0], torch.diag(torch.tensor([0.5, 1.0, 0.5])))
    return vf.diagnose(flow, target, progress=False, num_draws=1000)


@pytest.fixture(scope="module")
def bimodal():
    """Two modes of which the flow has one; locating finds both."""
    flow = gaussian_flow([6.0, 0.0], torch.eye(2))
    return vf.diagnose(flow, vf.LogDensity(two_modes, dim=2), progress=False, num_draws=1000)


@pytest.fixture(scope="module")
def annealed(wrong):
    return wrong.anneal(**FEW)


def path_of(flow, target, modes=None):
    return annealing.LatentPath(DefensiveProposal(flow, modes), target)


def far_modes(loc, sd=1.0):
    loc = torch.tensor(loc, dtype=torch.float64)
    tril = (sd * torch.eye(loc.shape[1], dtype=torch.float64)).expand(len(loc), -1, -1)
    return Gaussians(loc, tril, (Origin(Kind.END),) * len(loc))


def mean_and_se(log_z, truth):
    ratio = (torch.tensor(log_z, dtype=torch.float64) - truth).exp()
    return float(ratio.mean()), float(ratio.std()) / math.sqrt(len(ratio))


def test_path_is_the_proposal_and_the_target_in_latent_space():
    torch.manual_seed(3)
    flow = vf.recipes.spline(2).double().requires_grad_(False)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn_like(p)
    target = vf.LogDensity(two_modes, dim=2)
    proposal = DefensiveProposal(flow, far_modes([[-6.0, 0.0], [6.0, 0.0]]))
    x, log_m, _, _ = proposal.draw(100)
    z, logdet = flow().bijection.inverse_and_logdet(x)
    path = annealing.LatentPath(proposal, target)
    torch.testing.assert_close(path.at(z).log_m, log_m)
    torch.testing.assert_close(path.at(z).log_p, target.log_prob(x))
    for b in (0.0, 0.3, 1.0):
        torch.testing.assert_close(path.log_prob(z, b), (1 - b) * log_m + b * target.log_prob(x) - logdet)


def test_draws_have_the_shares_of_the_proposal():
    """E[h] over m against the mixture's closed form: of each component as many as it should have on average."""
    flow, modes = gaussian_flow([0.0], [[1.0]]), far_modes([[50.0], [100.0], [150.0]], sd=0.1)
    path = path_of(flow, gaussian([0.0], [1.0], 0.0), modes)
    counts = torch.zeros(3)
    for _ in range(200):
        x = path.draw(50)[0].x[:, 0]  # 5 draws for 3 modes
        counts += torch.stack([((x - loc).abs() < 20).sum() for loc in (50, 100, 150)])
    assert (counts / (200 * 50) - 0.1 / 3).abs().max() < 0.002  # of at most 2 in 50 in each, 200 times


def test_temperatures_keep_the_ess():
    log_ratio = 3 * torch.randn(5000, dtype=torch.float64)
    b = annealing.next_temperature(0.2, log_ratio)
    w = ((b - 0.2) * log_ratio).exp()
    assert 0.2 < b < 1
    assert float(w.sum() ** 2 / w.square().sum()) / 5000 == pytest.approx(annealing.ESS_SHARE, abs=1e-6)
    assert annealing.next_temperature(0.2, 0.01 * log_ratio) == 1.0
    dead = torch.cat([log_ratio, torch.full((20_000,), -math.inf, dtype=torch.float64)])
    assert annealing.next_temperature(0.2, dead) == b  # draws outside the support ask for no more temperatures


def test_resampling_is_unbiased_and_keeps_the_shares_of_modes():
    x = torch.cat([torch.randn(300, 2), torch.randn(200, 2) + 40]).double()[torch.randperm(500)]
    log_w = torch.randn(500, dtype=torch.float64)
    w, counts = log_w.softmax(0), torch.zeros(500, dtype=torch.float64)
    for _ in range(2000):
        index = annealing.resample_along(log_w, x, 100)
        counts += torch.bincount(index, minlength=500)
        assert abs(float((x[index, 0] > 20).double().mean()) - float(w[x[:, 0] > 20].sum())) < 0.0101
    expected = 2000 * 100 * w
    assert float(((counts - expected) / expected.clamp_min(1.0).sqrt()).abs().max()) < 5


@pytest.mark.parametrize("tril", [[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [-1.0, 0.5]]])
def test_moves_leave_the_target_as_it_is(tril):
    """From exact draws of p, moved in a frame that need not fit, to draws with the same moments."""
    target = gaussian([1.0, -1.0], [0.7, 2.0], 0.0)
    path = path_of(gaussian_flow([0.0, 0.0], torch.eye(2)), target)
    tril = torch.tensor(tril, dtype=torch.float64)
    rung = annealing.Rung(1.0, tril, 0.4, lambda z: path.log_prob(z, 1.0))
    centre, sd = torch.tensor([1.0, -1.0]).double(), torch.tensor([0.7, 2.0]).double()
    start = z = centre + sd * torch.randn(20_000, 2, dtype=torch.float64)
    for _ in range(3):
        z, rate = rung.move(z)
    assert 0.5 < rate < 1
    standard = (z - centre) / sd
    assert standard.mean(0).abs().max() < 0.03  # 4 se
    assert (standard.square().mean(0) - 1).abs().max() < 0.04
    assert abs(float(standard.prod(-1).mean())) < 0.03
    assert float(((z - centre) / sd * (start - centre) / sd).mean(0).abs().max()) < 0.9


def test_wrong_gaussian(wrong, annealed):
    assert annealed.log_evidence_se < 0.03
    assert abs(annealed.log_evidence - 3.0) < 4 * annealed.log_evidence_se + 1e-3
    x = annealed.sample(16_000, seed=1)
    standard = (x - torch.tensor([1.0, -2.0, 0.5])) / torch.tensor([1.0, 2.0, 0.3])
    assert standard.mean(0).abs().max() < 0.1
    assert (standard.std(0) - 1).abs().max() < 0.06


def test_mode_that_the_flow_misses(bimodal):
    result = bimodal.anneal(**FEW)
    assert abs(result.log_evidence - 2.0) < 4 * result.log_evidence_se + 1e-3
    assert result.log_evidence_se < 0.1
    share = float((result.sample(8000, seed=0)[:, 0] > 0).double().mean())
    assert abs(share - 0.7) < 0.06


def test_banana_from_a_gaussian():
    """log Z = 0, and moments in closed form, from a Gaussian approximation of a bent density."""
    target = vf.catalogue.banana(dim=2)
    fitted = vf.fit(target, flow="gaussian", steps=50, progress=False, num_draws=1000)
    result = fitted.anneal(particles=500, replicates=4)
    assert abs(result.log_evidence) < 4 * result.log_evidence_se + 5e-3
    assert result.log_evidence_se < 0.1
    x = result.sample(8000, seed=0)
    assert x.mean(0).abs().max() < 0.5  # 0 and 0
    assert x.std(0).tolist() == pytest.approx([3.0, math.sqrt(19.0)], rel=0.15)  # sd(x₁²/3)² = 18


def test_estimate_is_unbiased(monkeypatch):
    """E[Ẑ] = Z, with few particles and on a frozen schedule of a poor pilot run."""
    monkeypatch.setattr(annealing, "KEPT_SWEEPS", 1)  # moves at b = 1 come after Ẑ
    flow, target = gaussian_flow([0.0, 0.0], torch.eye(2)), gaussian([2.0, 1.0], [0.5, 1.5], -1.0)
    with torch.no_grad():
        path = path_of(flow, target, far_modes([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
        rungs = annealing.pilot(path, 100)
        mean, se = mean_and_se([annealing.annealing_run(path, rungs, 23).log_z for _ in range(60)], -1.0)
    assert len(rungs) > 1
    assert se < 0.05
    assert abs(mean - 1) < 4 * se


def test_runs_do_not_change_the_schedule():
    flow, target = gaussian_flow([0.0, 0.0], torch.eye(2)), gaussian([2.0, 1.0], [0.5, 1.5], -1.0)
    with torch.no_grad():
        path = path_of(flow, target)
        rungs = annealing.pilot(path, 200)
        before = [(rung.b, rung.step, rung.leaps, rung.tril.clone()) for rung in rungs]
        for _ in range(2):
            annealing.annealing_run(path, rungs, 100)
    for rung, (b, step, leaps, tril) in zip(rungs, before, strict=True):
        assert (rung.b, rung.step, rung.leaps) == (b, step, leaps)
        assert torch.equal(rung.tril, tril)


def test_density_that_is_zero_in_places():
    flow = gaussian_flow([0.0, 0.0], torch.eye(2))
    fitted = vf.diagnose(flow, vf.LogDensity(half_plane, dim=2), progress=False, num_draws=1000)
    result = fitted.anneal(**FEW)
    assert abs(result.log_evidence - math.log(0.5)) < 4 * result.log_evidence_se + 1e-3
    assert (result.proposal.x[:, 0] < 2).all()
    mean = 2 - math.sqrt(2 / math.pi)
    assert abs(float(result.sample(8000, seed=0)[:, 0].mean()) - mean) < 0.03


def test_run_without_weight_counts_as_zero():
    """Ẑ = 0 where no particle meets the support; its mean with others stays right, its draws weigh nothing."""
    flow, target = gaussian_flow([0.0, 0.0], torch.eye(2)), vf.LogDensity(half_plane, dim=2)
    with torch.no_grad():
        path = path_of(flow, target)
        rungs = annealing.pilot(path, 200)
        alive = annealing.annealing_run(path, rungs, 100)
        path.target = vf.LogDensity(lambda x: half_plane(x + 1000) + 0 * x.sum(-1), dim=2)
        dead = annealing.annealing_run(path, rungs, 100)
    assert dead.log_z == -math.inf
    fitted = vf.diagnose(flow, target, progress=False, num_draws=1000)
    result = correct._result(fitted, rungs, [alive, dead])
    assert result.log_evidence == pytest.approx(alive.log_z - math.log(2))
    assert result.log_evidence_se == pytest.approx(1.0)  # sd(1, 0)/mean/√2
    assert (result.sample(500)[:, 0] < 2).all()
    with pytest.raises(ValueError, match=r"^anneal: .*raise particles="):
        correct._result(fitted, rungs, [dead, dead])


def test_inverse_that_fails_leaves_particles_where_they_are():
    """Draws that have no z stay in place, with their weight."""
    flow, target = gaussian_flow([0.0, 0.0], torch.eye(2)), gaussian([0.0, 0.0], [1.0, 1.0], 0.0)
    with torch.no_grad():
        path = path_of(flow, target)
        particles = path.draw(100)[0]
        particles.z[:7] = math.nan
        rung = annealing.Rung(1.0, torch.eye(2).double(), 0.5, lambda z: path.log_prob(z, 1.0))
        moved, _ = annealing.move(rung, path, particles)
    for name in ("x", "log_m", "log_p"):
        assert torch.equal(getattr(moved, name)[:7], getattr(particles, name)[:7])
    assert moved.z[:7].isnan().all()
    assert (moved.x[7:] != particles.x[7:]).any()


def test_points_without_a_gradient_are_neither_entered_nor_left():
    """√|x| − x² has no gradient at 0, where it is finite."""

    def log_p(z):
        return z[:, 0].abs().sqrt() - z[:, 0].square() + 0 * z[:, 1]

    rung = annealing.Rung(1.0, torch.eye(2).double(), 0.5, log_p)
    z = torch.tensor([[0.0, 0.3]] * 5 + [[0.5, 0.3]] * 5, dtype=torch.float64)
    moved, _ = rung.move(z)
    assert torch.equal(moved[:5], z[:5])
    assert (moved[5:] != z[5:]).any()


def test_standard_errors_are_those_over_the_replicates():
    """Against the delta method by hand, for runs of unequal Ẑ."""
    target = gaussian([0.0], [1.0], 0.0)
    x, log_z = torch.randn(300, 1, dtype=torch.float64), torch.tensor([0.1, -0.2, 0.4]).double()
    log_p = target.log_prob(x)
    draws = Weights(x, log_p - log_z.repeat_interleave(100), log_p)
    _, theta, _ = quantities_of(target, draws)
    error = partial(correct._error_over_runs, share=log_z.softmax(0))
    over = with_errors(estimate(theta, draws.log_w), theta, error)
    z, means = log_z.exp(), x.reshape(3, 100).mean(1)
    mean = (z * means).sum() / z.sum()
    assert over.mean[0] == pytest.approx(float(mean))
    assert over.mean_se[0] == pytest.approx(float(((z / z.sum()) ** 2 * (means - mean) ** 2).sum().mul(3 / 2).sqrt()))
    assert replicate_se(log_z) == pytest.approx(float(z.std() / z.mean() / math.sqrt(3)))


def test_verdict(wrong, annealed):
    """Too few draws for the precision that is asked for; a disagreement with the importance weights is told."""
    checks = {c.name: c for c in annealed.verdict.checks}
    carried = {c.name for c in wrong.verdict.carried()}
    assert set(checks) == {"precision", "sds", "evidence", "agreement", "tails", "evenness"} | carried
    claimed = all(c.passed for name, c in checks.items() if name != "sds")
    assert annealed.verdict.status == ("corrected" if claimed else "unreliable")
    assert checks["evidence"].statistic == annealed.log_evidence_se
    told = correct._agreement(wrong, wrong.log_evidence + 1.0, 0.01)
    assert not told.passed
    assert "misses mass" in told.sentence


def test_good_fit_is_corrected():
    fitted = vf.diagnose(gaussian_flow([0.0], [[1.2]]), gaussian([0.0], [1.0], 0.0), progress=False, num_draws=1000)
    result = fitted.anneal()
    assert result.verdict.status == "corrected", result.verdict.reasons
    assert result.log_evidence_se < 0.005


def test_posterior_of_the_same_kind(wrong, annealed, tmp_path):
    assert type(annealed) is type(wrong)
    assert annealed.flow is wrong.flow
    assert annealed.log_evidence == pytest.approx(log_mean(annealed.proposal.log_w))
    assert "anneal" not in wrong.settings.corrections
    done = json.loads(json.dumps(annealed.settings.corrections["anneal"]))
    assert done["temperatures"][-1] == 1.0
    assert len(done["log_evidence"]) == done["replicates"] == 4
    assert any(note.startswith("anneal: 4 runs of 400 particles") for note in annealed.notes)
    table = annealed.summary()
    assert table["mean"].to_numpy() == pytest.approx([1.0, -2.0, 0.5], abs=0.2)
    assert annealed.to_arviz(num_draws=100).posterior["x"].shape == (1, 100, 3)
    annealed.plot("marginals", path=tmp_path / "marginals.png")
    annealed.plot("weights", path=tmp_path / "weights.png")
    again = vf.load(annealed.save(tmp_path / "annealed.safetensors"), target=wrong.target)
    assert torch.equal(again.sample(50, seed=2), annealed.sample(50, seed=2))
    assert again.settings.corrections["anneal"] == annealed.settings.corrections["anneal"]


def test_seed_alone_decides_and_the_global_generator_is_left(wrong, annealed):
    state = torch.get_rng_state()
    again = wrong.anneal(**FEW)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.proposal.x, annealed.proposal.x)
    assert again.log_evidence == annealed.log_evidence
    assert wrong.anneal(**FEW, seed=1).log_evidence != annealed.log_evidence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 10}, "particles: expected an integer of at least 100, got 10"),
        ({"particles": 1e4}, "particles: expected an integer of at least 100, got 10000.0"),
        ({"replicates": 3}, "replicates: expected an integer of at least 4, got 3"),
        ({"threads": 0}, "threads: expected a positive integer, got 0"),
    ],
)
def test_refused_in_one_line(wrong, options, message):
    with pytest.raises(ValueError) as error:
        wrong.anneal(**options)
    assert str(error.value) == message


def test_needs_a_target_and_a_proposal_that_reaches_it(wrong, annealed, tmp_path):
    loaded = vf.load(annealed.save(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match=r"^anneal: this posterior has no target; .*target="):
        loaded.anneal()
    with torch.no_grad(), pytest.raises(ValueError, match=r"^anneal: expected a proposal that reaches the target"):
        path = path_of(wrong.flow, vf.LogDensity(lambda x: torch.where(x[:, 0] > 1e9, 0.0 * x[:, 0], -torch.inf), 3))
        annealing.pilot(path, 100)


def test_resampled_draws_last():
    """Equal weights, the same evidence, and moments of the target within the error of the weights and of n draws."""
    target = vf.LogDensity(lambda x: -0.5 * (x - 1).square().sum(-1), dim=2)
    flow = gaussian_flow([0.0, 0.0], [[1.5, 0.0], [0.0, 1.5]])
    posterior = vf.diagnose(flow, target, progress=False)
    kept = posterior.resample(20_000, seed=1)
    x = kept.proposal.x
    assert kept.proposal.log_w.std() < 1e-9 and kept.verdict.status == "corrected"
    assert kept.log_evidence == posterior.log_evidence == pytest.approx(math.log(2 * math.pi), abs=0.01)
    assert (x.mean(0) - 1).abs().max() < 0.03 and (x.std(0) - 1).abs().max() < 0.03
    assert torch.equal(kept.sample(20_000, seed=2).sort(0).values, x.sort(0).values)  # each once
    with pytest.raises(ValueError, match="num_draws: expected an integer of at least 100, got 3"):
        posterior.resample(3)


def test_a_check_that_concerns_the_target_is_carried_over():
    """Annealing from draws that have missed a basin misses it as well: no claim, whatever the runs are like."""
    target = vf.LogDensity(lambda x: -0.5 * x.square().sum(-1), dim=1)
    posterior = vf.diagnose(gaussian_flow([0.0], [[1.2]]), target, progress=False, num_draws=1000)
    assert posterior.anneal().verdict.status == "corrected"
    missed = Check("unseen basins", 1.0, 0.01, False, "a basin was missed", Role.CONDITION)
    verdict = dataclasses.replace(posterior.verdict, checks=(missed,))
    annealed = dataclasses.replace(posterior, verdict=verdict).anneal()
    assert annealed.verdict.status == "unreliable" and missed in annealed.verdict.checks


def test_the_time_that_annealing_takes_is_told_before_it_is_taken(wrong):
    """The pilot tells pilot and runs; where they may not take it, one line says so."""
    told, path = [], path_of(wrong.flow, wrong.target, wrong.modes)
    with torch.no_grad():
        began = time.monotonic()
        rungs = annealing.pilot(path, 400, replicates=4, afford=told.append)
        done = time.monotonic() - began
        for _ in range(4):
            annealing.annealing_run(path, rungs, 400)
        took = time.monotonic() - began
    assert len(told) == 1 + annealing.TUNING * len(rungs) and told[-1] > done
    assert took / 4 < told[-1] < 4 * took
    with pytest.raises(ValueError, match=r"^annealing would take about .*, and is given 0 s: posterior.anneal"):
        correct.anneal(wrong, 400, 4, 0, progress=False, threads=1, seconds=1e-3)


def test_temperatures_to_come():
    """By the last factor, from the third on: 50 = 2^5.6; by four before that: 50 = 4^2.8."""
    assert annealing._temperatures_left(0.01, 0.02, 3) == 6
    assert annealing._temperatures_left(0.0, 0.02, 1) == annealing._temperatures_left(0.01, 0.02, 2) == 3
    assert annealing._temperatures_left(0.9, 1.0, 5) == annealing._temperatures_left(0.0, 1.0, 1) == 0
    assert annealing._temperatures_left(0.1, 0.1, 5) == annealing.MOST_RUNGS


def test_one_temperature_mends_nothing():
    """A pilot that sees m and p as one, although weights failed: runs from there would agree with each other."""
    target = vf.LogDensity(lambda x: -0.5 * x.square().sum(-1), dim=1)
    posterior = vf.diagnose(gaussian_flow([0.0], [[1.1]]), target, progress=False, num_draws=1000)
    unreliable = dataclasses.replace(posterior, verdict=posterior.verdict.refused(TAILS))
    with pytest.raises(ValueError, match=r"^annealing would repeat what is wrong \(tails\)"):
        unreliable.anneal(**FEW)
    with Progress(False) as bar:
        mended = correct.mended(unreliable, Clock(None), bar)
    assert mended.verdict.status == "unreliable" and "one temperature" in mended.notes[-1]


def test_nothing_is_annealed_that_has_no_place_or_no_time(wrong):
    for name, role in (("improper", Role.TARGET), ("unseen basins", Role.CONDITION), ("time", Role.TARGET)):
        verdict = wrong.verdict.refused(Check(name, 1.0, 1.0, False, "so", role))
        kept = dataclasses.replace(wrong, verdict=verdict)
        with Progress(False) as bar:
            assert correct.mended(kept, Clock(None), bar) is kept
    with Progress(False) as bar:
        late = correct.mended(dataclasses.replace(wrong, verdict=wrong.verdict.refused(TAILS)), Clock(1e-3), bar)
    assert late.verdict.status == "unreliable" and "annealing would take" in late.notes[-1]


# --- necks that the proposal leaves out ---


def neck(x):
    """v ~ N(0, 1) and eight values ~ N(0, e^v) given it: log Z = 4.5 log 2π, and five in a hundred have v < −1.645."""
    return -0.5 * x[:, 0].square() - 0.5 * (x[:, 1:] * (-x[:, :1]).exp()).square().sum(-1) - 8 * x[:, 0]


def test_bridge_needs_no_draws_of_the_proposal_where_those_of_p_are():
    """m = N(0, 1) above −1.5 alone and p = e³ N(0, 1): weights alone miss 7 %, the bridge does not."""
    torch.manual_seed(0)
    of_p, of_m = torch.randn(2, 40_000, dtype=torch.float64)
    inside = 0.5 * math.erfc(-1.5 / math.sqrt(2))
    log_w = torch.where(of_p > -1.5, 3.0 + math.log(inside), math.inf)
    of_m = torch.full_like(of_m[of_m > -1.5], 3.0 + math.log(inside))
    assert log_mean(of_m) == pytest.approx(3 + math.log(inside))
    assert bridge(of_m, log_w) == pytest.approx(3.0, abs=0.005)


def test_a_neck_is_annealed_by_moves_of_scales():
    """A Gaussian q, whose draws end above the neck: annealed, they come to its end, and so does log Ẑ; and chains."""
    posterior = vf.fit(vf.LogDensity(neck, dim=9), flow="gaussian", seed=1, progress=False, correct=False)
    assert posterior.verdict.status == "unreliable"
    annealed = posterior.anneal(500, 8)
    checks = {check.name: check for check in annealed.verdict.checks}
    assert "settled" in checks and "agreement" not in checks and checks["necks"].passed
    exact = 4.5 * LOG_2PI
    assert abs(annealed.log_evidence - exact) < 4 * annealed.log_evidence_se < 0.06
    of_p, of_q = annealed.sample(20_000, seed=0), posterior.flow().sample((20_000,))
    off = [abs(float((x[:, 0] < -1.645).double().mean()) - 0.05) for x in (of_p, of_q)]
    assert off[0] < 0.012 < off[1]
    chains = posterior.mcmc("hmc", num_draws=400)
    assert "moves of scales" in chains.notes[-1] and "bridge" in chains.notes[-1]
    assert abs(chains.log_evidence - exact) < 5 * chains.log_evidence_se


def test_moves_that_have_not_come_to_their_end_are_no_claim():
    rising, still = torch.full((8,), 0.02).double(), torch.zeros(8).double()
    assert not correct._settled(still, rising).passed and correct._settled(still, still).passed
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    assert not correct._settled(still, 0.1 * noise).passed  # nor is what is too uncertain to tell
