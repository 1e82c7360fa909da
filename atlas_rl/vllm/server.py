"""Calls into the drafters of a `vllm serve` process, for `--worker-extension-cls` and vLLM's `collective_rpc`.

A server learns from its traffic on its own. These calls tell it what traffic cannot: that the policy has new weights. Over
HTTP, vLLM's development endpoint passes strings only, hence the types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas_rl.vllm.proposer import AtlasProposer


class AtlasWorkerExtension:
    """Worker extension of vLLM; every method answers on every rank."""

    model_runner: Any

    def atlas_policy_updated(self, version: str | None = None) -> dict[str, Any]:
        """The server's weights were changed by other means: drafters learn from the rollouts they have seen.

        Args:
            version: Of the policy, a whole number, not below the present one; None counts up by one.

        Returns:
            The policy version by now.
        """
        proposer = self._atlas_proposer()
        return self._answer(proposer.policy_updated(proposer.drafting.tracker.checked(version)))

    def atlas_load_weights(self, folder: str, version: str | None = None) -> dict[str, Any]:
        """Load a checkpoint of the same policy from a folder that the server can read, then `atlas_policy_updated`.

        Everything is checked before anything moves. Where the checkpoint is refused, the old weights go on being served.

        Args:
            folder: Of the checkpoint, with the tensors of the one that is served.
            version: See `atlas_policy_updated`.

        Returns:
            The policy version by now.

        Raises:
            ValueError: A wrong version; a folder that is missing, damaged, of another policy, or not finite.
        """
        return self._answer(self._atlas_proposer().load_checkpoint(self.model_runner, folder, version))

    def atlas_status(self) -> dict[str, Any]:
        """State that a trainer checks before it relies on the server.

        Returns:
            `server`, a random name that a restart changes; `policy_version`; `weights_are_whole`, False while an update has
            changed some weights and not all; `num_trainers`, how many have connected to send weights so far.
        """
        return self._atlas_proposer().status()

    def atlas_report(self) -> dict[str, Any]:
        """Step report, as JSON, about the requests that ended since the last report."""
        return self._atlas_proposer().take_report().to_dict()

    def _answer(self, done: dict[str, Any]) -> dict[str, Any]:
        """Answer of a weight update; says if the caller must reset the prefix cache, which another process holds."""
        from atlas_rl.vllm.internals import in_engine_process

        if in_engine_process(self.model_runner.vllm_config):
            return done
        return done | {"left_to_do": "POST /reset_prefix_cache?reset_running_requests=true"}

    def _atlas_proposer(self) -> AtlasProposer:
        from atlas_rl.vllm.checks import PROPOSER
        from atlas_rl.vllm.proposer import AtlasProposer

        drafter = getattr(self.model_runner, "drafter", None)
        if not isinstance(drafter, AtlasProposer):
            raise ValueError(
                f"this server was started without our drafter: its --speculative-config needs model {PROPOSER}"
            )
        return drafter
