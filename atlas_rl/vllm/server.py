"""Calls into the drafters of a `vllm serve` process, for `--worker-extension-cls` and vLLM's `collective_rpc`.

A server learns from its traffic on its own. These calls tell it what traffic does not show: that the policy has new
weights. vLLM's HTTP development endpoint passes strings only, hence the argument types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas_rl.vllm.proposer import AtlasProposer


class AtlasWorkerExtension:
    """Worker extension of vLLM; every method answers on every rank."""

    model_runner: Any

    def atlas_policy_updated(self, version: str | None = None) -> dict[str, Any]:
        """Notify drafters that the server's weights were changed by other means: they learn from past rollouts.

        Args:
            version: Version of the policy: a whole number, not below the present one; None adds one.

        Returns:
            The new policy version.
        """
        proposer = self._atlas_proposer()
        return self._answer(proposer.policy_updated(proposer.drafting.tracker.checked(version)))

    def atlas_load_weights(self, folder: str, version: str | None = None) -> dict[str, Any]:
        """Load a checkpoint of the same policy from a folder that the server can read, then `atlas_policy_updated`.

        Everything is checked before anything changes. If the checkpoint is refused, the old weights stay in use.

        Args:
            folder: Folder of the checkpoint, with the same tensors as the one being served.
            version: See `atlas_policy_updated`.

        Returns:
            The new policy version.

        Raises:
            ValueError: The version is wrong, or the folder is missing, damaged, of another policy, or not finite.
        """
        return self._answer(self._atlas_proposer().load_checkpoint(self.model_runner, folder, version))

    def atlas_status(self) -> dict[str, Any]:
        """State that a trainer checks before it relies on the server.

        Returns:
            `server`, a random name that changes with a restart; `policy_version`; `weights_are_whole`, False while an
            update has changed only some of the weights; `num_trainers`, the number of trainers that have connected to
            send weights.
        """
        return self._atlas_proposer().status()

    def atlas_report(self) -> dict[str, Any]:
        """Step report, as JSON, about the requests that ended since the last report."""
        return self._atlas_proposer().take_report().to_dict()

    def _answer(self, done: dict[str, Any]) -> dict[str, Any]:
        """Answer of a weight update; says whether the caller must reset the prefix cache, which another process holds."""
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
