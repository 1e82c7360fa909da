"""`AtlasRolloutEngine`, the public class: `attach` makes a trainer generate with it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from atlas_rl.checks import reject_unknown
from atlas_rl.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    from transformers import Trainer


class AtlasRolloutEngine(RolloutEngine):
    """Rollouts by speculative decoding that follows the policy.

        AtlasRolloutEngine().attach(trainer)                                 # every trainer of TRL that samples
        GRPOTrainer(..., rollout_func=AtlasRolloutEngine())                  # the second way in
        AtlasRolloutEngine(model=policy, tokenizer=tok).generate(prompts, max_new_tokens=64)

    Tokens are exactly the policy's: with one seed they are the same whatever is drafted, and with speculation off.
    Arguments are those of `RolloutEngine`; its options are the fields of `EngineConfig`.
    """

    _adapter: Any = None

    def attach(self, trainer: Trainer, *, baseline_every: int = 0, **unknown: Any) -> AtlasRolloutEngine:
        """Make `trainer`, one of TRL's that sample (docs/trainers.md), generate with this engine; returns the engine.

        Args:
            trainer: Built as usual: with `use_vllm=False` for generation in process or for `backend="vllm"`, or inside
                `prepare_vllm()` with `use_vllm=True`. With `vllm_mode="server"` a server generates that
                `atlas-rl vllm-serve` started.
            baseline_every: Repeat every n-th training generation without speculation, check that the tokens are the
                same, and put its tokens/s into the report; 0 never. For measurements: it costs the time it measures.
            unknown: Refused, with the nearest option's name.

        Raises:
            ValueError: A trainer that cannot be attached to, or sampling options that cannot be honoured; the trainer
                is then as it was.
        """
        reject_unknown(unknown, ("baseline_every",), "attach()")
        from atlas_rl.integrations.trl.adapter import adapter_of

        # A trainer that an engine generates for in process has use_vllm=True as well.
        asks = self.config.backend == "auto" and getattr(trainer, "use_vllm", False) and adapter_of(trainer) is None
        module: Any
        if not asks and self.config.backend != "vllm":
            from atlas_rl.integrations.trl import in_process as module
        elif getattr(getattr(trainer, "args", None), "vllm_mode", "colocate") == "server":
            from atlas_rl.integrations.trl import server as module
        else:
            from atlas_rl.integrations.trl import vllm as module
        self._adapter = module.attach(self, trainer, baseline_every)
        self._without_policy = (
            "this engine is attached to a trainer, which asks it for rollouts in train(). For prompts of your own use "
            "AtlasRolloutEngine(model=trainer.model, tokenizer=...).generate(...)"
        )
        return self

    def prepare_vllm(self, **arguments: Any) -> AbstractContextManager[None]:
        """Context for building trainers with `use_vllm=True`: TRL's vLLM engine is built with our drafters.

            with engine.prepare_vllm():
                trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, vllm_mode="colocate"))
            engine.attach(trainer)

        Args:
            arguments: Further ones of `vllm.LLM`, for which TRL has no option, such as `enforce_eager=True`.

        Raises:
            ValueError: vLLM is missing, or of a version that is not known.
        """
        from atlas_rl.integrations.trl.vllm import drafting_engines

        return drafting_engines(self.config, **arguments)

    def __call__(self, prompts: list[Any], trainer: Trainer) -> dict[str, Any]:
        """TRL's `rollout_func`: takes prompts already repeated per generation, returns token ids and logprobs."""
        if self.config.backend == "vllm":
            raise ValueError("rollout_func=engine generates in process: with vLLM use engine.attach(trainer)")
        from atlas_rl.integrations.trl.adapter import rollout_func

        return rollout_func(self, trainer).rollout_func(prompts)
