"""Predicts the speedup of speculation on GPUs that are not at hand, from a roofline (`docs/planner.md`)."""
