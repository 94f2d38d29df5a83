"""The thresholds of the verdict and of locating, in one table: value, unit, what a user loses, what set it."""

from __future__ import annotations


class Bound(float):
    """A number that decides, with its unit, what a user loses where it is wrong, and whence it comes."""

    unit: str
    loses: str
    origin: str

    def __new__(cls, value: float, unit: str = "", loses: str = "", origin: str = "chosen") -> Bound:
        self = super().__new__(cls, value)
        self.unit, self.loses, self.origin = unit, loses, origin
        return self


# ---- What weights of the defensive proposal must be like for any claim ----
UNSEEN = Bound(
    0.02,
    "of ∫p",
    "higher: a mode's share of the mass that no draw has seen goes into a claim; lower: heavy tails are refused",
    "k̂ < 0.7 alone raised alarms at .71 and passed a fit at .68 that was wrong",
)
MEAN_UNSEEN = Bound(0.05, "sd", "as UNSEEN, for means: half of what makes a mean wrong", "half of SHIFT")
HEAVIEST = Bound(
    0.95,
    "shape of the weights' tail, at most",
    "higher: one Pareto fit that is off hides all of ∫p; lower: tails without a mean are taken for lighter ones",
    "weights of an integrable p have a mean, so their shape is below 1",
)
MEAN_SE = Bound(0.025, "sd", "higher: means are off by SHIFT by chance; lower: judging takes more draws", "SHIFT / 4")
ENDS_SE = Bound(
    0.003,
    "probability at the 5 and 95 % points",
    "higher: quantiles are claimed that chance has moved; lower: judging takes more draws",
    "a fifth of ENDS_SHIFT; .0025 at the median had asked for an effective sample of 40,000",
)
MEDIAN_SE = Bound(0.006, "probability at the median", "as ENDS_SE", "a fifth of MEDIAN_SHIFT")
LOG_SD = Bound(0.1, "of log sd", "higher: an sd that tails leave open is claimed; lower: sds are named that are right")
ROUNDED = Bound(
    0.01,
    "nats",
    "higher: differences between draws are rounding, which looks like p; lower: large constants are refused",
    "a float32 density near 1e8 gave an sd of 1.40 for 1",
)
HIDDEN = Bound(0.002, "of ∫p", "higher: a claim is of the part of p that has values; lower: far overflows are refused")
KHAT_BOUND = Bound(0.7, "k̂", "higher: chains are compared with weights that mislead", "Vehtari et al. 2024")

# ---- What the flow must be like beside, for its own draws to be used ----
MISSING_MASS = Bound(0.02, "of ∫p", "higher: the flow lacks a mode that unweighted draws then lack", "UNSEEN")
DIVERGENCE = Bound(
    0.05,
    "nats of KL(q‖p)",
    "higher: dependence that is missed goes unseen in marginals; lower: good flows are called corrected",
    "independent normals for a correlation of .3 cost as much",
)
SHIFT = Bound(0.1, "sd", "what a mean that is wrong is off by: all else of means follows", "chosen: see LIMITS")
ENDS_SHIFT = Bound(0.015, "probability at the 5 and 95 % points", "what is wrong there: as SHIFT", "chosen: see LIMITS")
MEDIAN_SHIFT = Bound(0.03, "probability at the median", "what is wrong there: as SHIFT", "chosen: see LIMITS")

# ---- What the target is asked anew ----
MOVE = Bound(0.1, "sd", "higher: mass that moves would find nearby goes into a claim; lower: chance refuses", "SHIFT")
MOVE_ERROR = Bound(0.001, "probability", "how often chance alone refuses a right fit, by Hamiltonian moves")
MARGIN = Bound(1.0, "nats", "higher: a probe on a mode that m hardly covers is not looked at; lower: time")
BASIN = Bound(
    0.01, "of ∫p", "higher: a mode of that mass is missed and claimed; lower: specks refuse a fit", "UNSEEN / 2"
)
FAR_SHARE = Bound(
    0.05,
    "of the mass of lines",
    "higher: an improper direction with a low plateau is claimed; lower: heavy tails are called improper",
    "Markov: a proper p with share s so far out fails with probability s/.05",
)
NECK_MEAN = Bound(
    0.07,
    "sd of a scale",
    "higher: the neck of a hierarchy is missing from a claim; lower: chance refuses",
    "two thirds of SHIFT: what is seen of it is certain to a fifth, and walks end short",
)
NECK_SHARE = Bound(0.01, "probability beyond a 5 or 95 % point", "as NECK_MEAN", "two thirds of ENDS_SHIFT")
NECK_ERROR = Bound(0.001, "probability", "how often chance alone refuses a right fit, by moves of scales")

# ---- Corrections ----
EVIDENCE_SE = Bound(0.05, "nats", "higher: log Z is claimed that runs do not agree on; lower: runs must be repeated")
AGREEMENT = Bound(
    3.0, "standard errors", "higher: a mode that one of two estimates lacks passes; lower: chance refuses"
)
UNEVEN = Bound(0.9, "of the particles", "higher: a tenth of the particles carries a step, and Ẑ is off unseen")
RHAT = Bound(1.01, "R̂", "higher: chains that have not mixed are claimed", "Vehtari et al. 2021")
LEAST_ESS = Bound(400, "draws", "lower: R̂ and standard errors are not to be believed", "Vehtari et al. 2021")
DIVERGENT = Bound(
    0.002, "of the transitions", "higher: a part too steep for the step is missing; lower: chance refuses"
)
BFMI = Bound(0.3, "E-BFMI", "lower: tails that momenta do not reach are missing", "Betancourt 2016")
DISTANCE = Bound(0.01, "total variation", "higher: chains are begun too near their start", "UNSEEN / 2")

# ---- Locating ----
SAME_MODE = Bound(
    1.0, "Mahalanobis distance by √D", "higher: two modes are taken for one, and one is lost; lower: more components"
)
BETTER = Bound(
    3.0,
    "nats of ELBO",
    "higher: Laplace on a spike keeps its place; lower: a Gaussian covers two modes and their shares are lost",
    "one of two false claims in 73 sat on a spike",
)
NEGLIGIBLE = Bound(
    7.0, "nats below the heaviest optimum", "lower: a mode of 1/1000 of the mass stops no wave; higher: more waves"
)
WORTH = Bound(
    2.0, "nats of ELBO", "lower: modes are given up for one Gaussian; higher: a mixture that fits worse is kept"
)
NO_MODE = Bound(30.0, "nats below the best", "lower: a mode that Laplace underrates is dropped; higher: components")
WAVES = Bound(6, "of starts", "lower: the last of many modes are missed; higher: time where modes have no end")
ENOUGH = Bound(
    2,
    "waves in a row that find nothing",
    "lower: a mode that attracts 1 % of starts is missed; higher: time",
    "300 fits",
)
EVEN = Bound(
    3e-4,
    "variance of log-weights",
    "higher: the Gaussian is kept though its tails cost k̂; lower: normals are given flows",
    "at .002 a normal's tails still cost k̂ .7",
)
PAYS = Bound(
    30.0, "variance of log-weights", "higher: training is trusted with what it does not mend; lower: necks are lost"
)
GOOD = Bound(0.02, "variance of log-weights", "higher: a better start is not tried; lower: every start is trained")


def table() -> list[tuple[str, float, str, str, str]]:
    """(name, value, unit, what a user loses, origin) of every bound, in the order above."""
    return [(n, float(b), b.unit, b.loses, b.origin) for n, b in globals().items() if isinstance(b, Bound)]
