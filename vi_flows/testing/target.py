"""Is a density fit to be fitted? The check that every fit starts with, for a user's own tests."""

from ..targets.check import CheckReport, check_target, settle_dtype

__all__ = ["CheckReport", "check_target", "settle_dtype"]
