"""Decisions of the adaptive controller in plain numpy: how far to ask one drafter, and whom to ask next."""

from __future__ import annotations

import numpy as np

from atlas_rl.controller.arms import LEAST_TRIAL, NOT_ASKED, TRIAL_DEPTH, TRIALS
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD
from atlas_rl.controller.promises import DrafterModel, Kept, discount


def search_by_levels(current, expected, better, table, draft_s, depths, discount):
    """`search`: every answer's slots counted by levels of survival, likeliest first."""

    def verified(survival, seconds):
        values = survival[survival > 0]
        level = np.minimum(((1 - values) * 64).astype(int), 63)
        counts = np.bincount(level, minlength=64)
        tokens = np.append(len(current), len(current) + np.cumsum(np.bincount(level, values, minlength=64)))
        whole_s = table[len(current) + np.append(0, np.cumsum(counts))] + seconds
        worth = np.append(1.0, np.full(64, discount))
        best = (worth * tokens / whole_s).argmax()
        return tokens[best], worth[best] * tokens[best], whole_s[best]

    answers = {(0, 0): np.array(verified(current, draft_s[0, 0]))}
    for whom, rows in ((1, better), (2, np.ones(len(current), bool))):
        for index, depth in enumerate(depths):
            cut = np.where(np.arange(current.shape[1]) < depth, expected, 0)
            taken = rows & (cut.sum(axis=2) > current.sum(axis=1))
            if not taken.any():
                continue  # it would cost, and bring nothing
            survivals = np.where(taken[..., None], cut, current)
            answers[whom, index] = np.sum([verified(one, draft_s[whom, index]) for one in survivals], axis=0)
    best = max(answers, key=lambda answer: answers[answer][1] / answers[answer][2])  # the first of equals
    return *best, answers[best][0] / answers[best][2]


def decide_in_numpy(
    current, room, forecast, table, cost, spent_s, first_s, backlog, depths, discount, *, for_all=False
):  # fmt: skip
    """`decide`; without a `cost` drafts are free."""
    expected = forecast.predict(current[:, 0])
    expected = np.where(np.arange(MAX_LOOKAHEAD)[None] < room[:, None], expected, 0.0)
    better = for_all | (expected.mean(axis=0).sum(axis=1) > current.sum(axis=1))
    draft_s = np.full((3, len(depths)), spent_s)
    if cost is not None:
        for whom, rows in ((1, int(better.sum())), (2, len(room))):
            draft_s[whom] += first_s + cost.predict(rows, depths, min(backlog, 2 * rows))
    whom, index, goodput = search_by_levels(current, expected, better, table, draft_s, depths, discount)
    asked = (np.zeros(len(room), bool), better, np.ones(len(room), bool))[whom]
    return np.where(asked, depths[index], 0), goodput


def ask_in_numpy(
    models: list[DrafterModel],
    purses_s: np.ndarray,
    plain: Kept,
    current: np.ndarray,
    room: np.ndarray,
    backlogs: np.ndarray,
    table: np.ndarray,
    spent_s: float,
    first_s: float,
    depths: np.ndarray,
    for_all: bool,
) -> tuple[int, np.ndarray, float, bool]:
    """`ask_next`, drafter by drafter: its answer without the survival of first tokens. Takes from `purses_s`."""
    batch, is_trial = len(room), False
    left = [own for own, tokens in enumerate(backlogs) if tokens != NOT_ASKED]
    left.sort(key=lambda own: models[own].cost.predict(batch, 1.0) if len(models[own].cost) else 0.0)
    for own in left:
        model, wanted, goodput = models[own], np.full(batch, TRIAL_DEPTH), 0.0
        if len(model.cost) < TRIALS:
            is_trial = True
        else:
            is_known, worth = model.cost.knows(batch), discount(model.kept, plain)
            answer, expected = decide_in_numpy(
                current, room, model.forecast, table, model.cost if is_known else None, spent_s, first_s,
                int(backlogs[own]), depths, worth, for_all=for_all,
            )  # fmt: skip
            if answer.any() and is_known:
                wanted, goodput = answer, expected
            elif answer.any():
                is_trial = True
            else:
                draft_s = model.cost.predict(batch, float(TRIAL_DEPTH), int(backlogs[own]))
                cost_s = max(draft_s + first_s, LEAST_TRIAL * table[batch])
                if purses_s[own] >= cost_s:
                    purses_s[own] -= cost_s
                else:
                    wanted = 0 * wanted
        wanted = np.minimum(wanted, room)
        if wanted.any():
            return own, wanted, goodput, is_trial
    return -1, np.zeros(batch, np.int64), 0.0, is_trial
