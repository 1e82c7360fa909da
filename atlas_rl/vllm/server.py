"""Calls into the drafters of a `vllm serve` process, for `--worker-extension-cls` and vLLM's `collective_rpc`.

A server learns from its traffic on its own. These calls tell it what traffic cannot: that the policy has new weights. Over
HTTP, vLLM's development endpoint passes strings only, hence the types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas_rl.vllm.proposer import AtlasProposer


class AtlasWorkerExtension:
    """Mixed into vLLM's worker; every method answers on every rank."""

    model_runner: Any

    def atlas_policy_updated(self, version: str | None = None) -> dict[str, Any]:
        """The server's weights were changed by other means: drafters learn from what they have seen.

        Args:
            version: Of the policy, a whole number; None counts up by one.

        Returns:
            The policy version by now.
        """
        return self._atlas_proposer().policy_updated(None if version is None else int(version))

    def atlas_load_weights(self, folder: str, version: str | None = None) -> dict[str, Any]:
        """Load a checkpoint of the same policy from a folder that the server can read, then `atlas_policy_updated`.

        Reset vLLM's prefix cache afterwards: it lives outside of the worker.
        """
        self.model_runner.reload_weights(weights_path=folder)
        proposer = self._atlas_proposer()
        proposer.weights_changed()
        return proposer.policy_updated(None if version is None else int(version))

    def atlas_report(self) -> dict[str, Any]:
        """A step report, as JSON, of the requests that ended since the last call."""
        return self._atlas_proposer().take_report().to_dict()

    def _atlas_proposer(self) -> AtlasProposer:
        from atlas_rl.vllm.checks import PROPOSER
        from atlas_rl.vllm.proposer import AtlasProposer

        drafter = getattr(self.model_runner, "drafter", None)
        if not isinstance(drafter, AtlasProposer):
            raise ValueError(
                f"this server was started without our drafter: its --speculative-config needs model {PROPOSER}"
            )
        return drafter
