"""The doors: fit, diagnose and load, and the Posterior that they return."""
