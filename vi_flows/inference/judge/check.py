"""A step of the verdict's rule, and the verdict that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

UNRELIABLE = "do not rely on these draws"  # what every refusal begins with: without it reasons read as remarks


class Role(str, Enum):
    """What kind of failure a check that does not pass is."""

    DRAWS = "draws"  # weighted draws are not those of p: no claim, until a correction has judged its own
    NECK = "neck"  # the same, where a scale is small: moves of scales go there
    TARGET = "target"  # no claim, by whatever draws: corrections carry the check on
    CONDITION = "condition"  # as TARGET; passed, every claim is conditional on it, and says so
    FLOW = "flow"  # draws of the flow are not those of p: resampling from the proposal mends it
    CAVEAT = "caveat"  # a claim leaves something out, and says what
    BESIDE = "beside"  # as DRAWS; passed, a claim with a caveat says it


CARRIED = (Role.TARGET, Role.CONDITION)  # checks of a fit that hold for its corrections: no other draws mend them
# what does not keep weighted draws from a claim, which says so
SPARED = (Role.FLOW, Role.CAVEAT)
# what a claim with a caveat says though it passed: without it claims look absolute
SAID = (Role.CONDITION, Role.BESIDE)


@dataclass(frozen=True)
class Check:
    """One step of the rule: passed if statistic < bound; sentence says it in words; role, what failing means."""

    name: str
    statistic: float
    bound: float
    passed: bool
    sentence: str
    role: Role = Role.DRAWS

    @classmethod
    def of(cls, name: str, statistic: float, bound: float, said: str, otherwise: str, role: Role = Role.DRAWS) -> Check:
        """The check of a statistic: ``said`` where it passes, else ``otherwise``."""
        passed = statistic < bound
        return cls(name, statistic, float(bound), passed, said if passed else otherwise, role)


def claimed(checks: Sequence[Check]) -> bool:
    """Whether weighted draws are as they should be, but for what a claim leaves out."""
    return all(check.passed for check in checks if check.role not in SPARED)


@dataclass(frozen=True)
class Verdict:
    """status is "reliable", "corrected" or "unreliable"; reasons are sentences; checks the steps behind them.

    The bounds of the checks stand in :mod:`vi_flows.inference.bounds`, with what a user loses where one is wrong.
    """

    status: str
    reasons: tuple[str, ...]
    checks: tuple[Check, ...] = ()

    @classmethod
    def of(cls, checks: Sequence[Check], corrected: str, reliable: str | None = None) -> Verdict:
        """All pass: reliable, if a sentence says so; all but what resampling mends: corrected; else unreliable."""
        failed = [check for check in checks if not check.passed]
        status, lead = "unreliable", UNRELIABLE
        if claimed(checks):
            mends = reliable is None or any(check.role is Role.FLOW for check in failed)
            status, lead = ("corrected", corrected) if mends else ("reliable", reliable)
        said = [check for check in checks if check.passed and check.role in SAID and status != "unreliable"]
        shown = [*failed, *said] if failed else checks
        return cls(status, (lead, *(check.sentence for check in shown)), tuple(checks))

    def failed(self, *roles: Role) -> list[str]:
        """The names of the checks of these roles that did not pass; of all roles, if none is named."""
        return [check.name for check in self.checks if not check.passed and (not roles or check.role in roles)]

    def carried(self) -> list[Check]:
        """The checks that hold for corrections."""
        return [check for check in self.checks if check.role in CARRIED]

    def refused(self, check: Check) -> Verdict:
        """No claim, because of one more check, whose sentence comes first."""
        return Verdict("unreliable", (UNRELIABLE, check.sentence, *self.reasons[1:]), (*self.checks, check))

    def because(self, reason: str) -> Verdict:
        """The same verdict with one more reason, before those of the checks; itself if that is empty."""
        return replace(self, reasons=(self.reasons[0], reason, *self.reasons[1:])) if reason else self
