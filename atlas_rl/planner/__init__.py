"""The planner: what speculation would bring on GPUs that are not here, from a roofline (`docs/planner.md`)."""
