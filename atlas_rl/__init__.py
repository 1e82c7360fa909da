"""atlas_rl: fast rollouts for RL post-training, by speculative decoding that follows the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas_rl.core import SamplingParams
    from atlas_rl.engine import AtlasRolloutEngine
    from atlas_rl.report.report import StepReport
    from atlas_rl.rollout.output import GenerationOutput

__version__ = "0.1.0"
__all__ = ["AtlasRolloutEngine", "GenerationOutput", "SamplingParams", "StepReport", "__version__"]

_HOME = {
    "AtlasRolloutEngine": "atlas_rl.engine",
    "GenerationOutput": "atlas_rl.rollout.output",
    "SamplingParams": "atlas_rl.core",
    "StepReport": "atlas_rl.report.report",
}


if not TYPE_CHECKING:  # or a type checker would take every name of this package for one that exists

    def __getattr__(name: str) -> Any:
        """Load public names on first use, so that `import atlas_rl` loads neither torch nor transformers."""
        if name not in _HOME:
            raise AttributeError(f"module 'atlas_rl' has no attribute '{name}'")
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
