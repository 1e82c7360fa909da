"""Reports to add up and to show, and a clock that moves when it is told to."""

from atlas_rl.report.report import StepReport


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def make_report(**changes):
    values = {
        "step": 12,
        "policy_version": 12,
        "mode": "train",
        "num_requests": 2,
        "num_prompt_tokens": 40,
        "num_tokens": 30,
        "num_forwards": 10,
        "num_request_forwards": 14,
        "num_decoded_tokens": 28,
        "drafted": {"history": 24},
        "accepted": {"history": 14},
        "drafted_by_position": (14, 10),
        "accepted_by_position": (10, 4),
        "generate_s": 2.0,
        "forward_s": 1.5,
        "other_s": 0.5,
        "entropy": 0.3,
        "mean_max_prob": 0.9,
        "num_scored_tokens": 30,
        "no_speculation_s": 3.0,
        "step_s": 5.0,
        "active_batch_curve": ((0, 2), (6, 2), (9, 1)),
        "completion_lengths": (10, 20),
    }
    return StepReport(**(values | changes))
