"""Refuses policies with recurrent layers whose states vLLM does not roll back exactly after rejected drafts.

vLLM keeps one state per verified token and reads, at the next step, that of the last accepted one. In some versions, on
CPUs, and for some families it reads another. The texts are then not the policy's, and no error is raised. docs/vllm.md
says for each family what was read in vLLM's code and what was run.
"""

from __future__ import annotations

from typing import Any

from atlas_rl.vllm.internals.version import installed_version, since

_ROLLED_BACK = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
"""Architectures with gated delta rules. vLLM tells their verified rows by the drafts that it scheduled, not by length."""

_SINCE = "0.32"  # before, a step without drafts reads the state of the first verified token (vLLM pull request 56531)


def check_hybrid(vllm_config: Any) -> None:
    """Raise `ValueError` if vLLM would verify drafts of this policy with wrong states; call it before the model loads."""
    model = vllm_config.model_config
    if not (model.is_hybrid or model.is_attention_free):
        return
    name = model.architecture
    if name not in _ROLLED_BACK:
        reason = f"vLLM is not known to roll back the recurrent layers of {name} in every step"
    elif vllm_config.device_config.device_type == "cpu":
        reason = f"on CPUs vLLM does not roll back the recurrent layers of {name} if drafts differ in length"
    elif not since(_SINCE):
        reason = (
            f"vLLM {installed_version()} loses accepted drafts from the recurrent layers of {name} after a step without "
            f"drafts: install vLLM {_SINCE}"
        )
    else:
        return
    raise ValueError(
        f"{reason}. Or use AtlasRolloutEngine(backend='in_process'), or vLLM without our proposer (docs/vllm.md, Hybrid "
        "policies)"
    )
