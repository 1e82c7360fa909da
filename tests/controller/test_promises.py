"""What drafting keeps of its promises, and when planning pauses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from atlas_rl.controller.promises import Kept, Pause, discount


def kept(ratio: float, steps: int = 200) -> Kept:
    """After steps that reached this share of the predicted goodput."""
    steps_of_a_kind = Kept()
    for _ in range(steps):
        steps_of_a_kind.observe(100 * ratio, 100)
    return steps_of_a_kind


def test_drafting_is_discounted_by_what_it_keeps_relative_to_plain_steps():
    assert discount(kept(0.9), kept(1.0)) == pytest.approx(0.9, rel=0.01)
    assert discount(kept(0.9), kept(0.9)) == pytest.approx(1, rel=0.01), (
        "a machine that is slower for all is no discount"
    )
    assert discount(kept(1.0), kept(0.9)) == pytest.approx(1, rel=0.01), "it is never a bonus"


def test_the_noise_of_step_times_is_taken_off():
    noisy = Kept()
    for step in range(200):
        noisy.observe(120 if step % 2 else 100 / 1.2, 100)
    assert discount(noisy, kept(1.0)) < 0.97
    assert discount(Kept(), Kept()) < discount(kept(1.0), kept(1.0))


def test_one_interrupted_step_says_little():
    assert kept(1e-3, steps=1).mean == kept(0.5, steps=1).mean == -0.25 / 4
    assert kept(1e3, steps=1).mean == 0.25 / 4


def test_doubt_fades_towards_what_plain_steps_keep():
    failed = kept(0.8)
    for _ in range(200):
        failed.fade(0.0)
    assert failed.mean == pytest.approx(0.13 * math.log(0.8), rel=0.05)


def plans(num_steps: int, batch: int, pause: Pause, asked: bool = False) -> list[bool]:
    """Which of these steps are planned, where every plan asks somebody or nobody."""
    planned = []
    for _ in range(num_steps):
        planned.append(not pause.holds(batch))
        if planned[-1]:
            pause.observe(batch, asked)
    return planned


def test_pauses_grow_while_nobody_is_asked():
    planned = [step for step, is_planned in enumerate(plans(60, 8, Pause())) if is_planned]
    gaps = [later - earlier for earlier, later in pairwise(planned)]
    assert gaps[:11] == [1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert set(gaps[11:]) == {9}


@pytest.mark.parametrize(("batch", "ends"), [(16, False), (15, False), (13, True), (17, True)])
def test_a_pause_ends_when_the_batch_is_another(batch, ends):
    pause = Pause()
    while not pause.holds(16):
        pause.observe(16, asked=False)
    pause.steps_left = 9
    assert pause.holds(batch) is not ends


def test_a_plan_that_asks_somebody_ends_the_pauses():
    pause = Pause()
    plans(60, 8, pause)
    while pause.holds(8):
        pass
    pause.observe(8, asked=True)
    assert all(plans(4, 8, pause))
