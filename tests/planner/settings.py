"""Settings of the planner by the names of their parts."""

from __future__ import annotations

from atlas_rl.planner.drafters import drafter_model
from atlas_rl.planner.hardware import GPUS, MEASURED, Machine
from atlas_rl.planner.model import parse_model
from atlas_rl.planner.speculation import Setting


def setting(config, gpu="h100", num_gpus=1, drafter="eagle3", context=1024, efficiency=MEASURED, **options):
    model = parse_model(config)
    machine = Machine(gpu=GPUS[gpu] if isinstance(gpu, str) else gpu, num_gpus=num_gpus, efficiency=efficiency)
    return Setting(model=model, machine=machine, drafter=drafter_model(drafter, model), context=context, **options)
