"""An adapter that is loaded into a running engine is a new policy: drafters hear of it, and its tokens are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from atlas_rl.vllm.internals import drafter_of
from tests.models import tiny_bigram
from tests.vllm_engines import completions, engine  # first: it skips this module where there is no vLLM

PROMPT = [2, 3, 4]


def policy() -> Any:
    return tiny_bigram(vocab=64, hidden=64, heads=2, kv_heads=2, context=128, seed=1, logit_std=3.0)


def adapted(seed: int) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(policy(), LoraConfig(r=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False))


def test_drafters_hear_of_a_new_adapter(tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    policy().save_pretrained(tmp_path / "policy")
    llm = engine(tmp_path / "policy", enable_lora=True, max_lora_rank=8, max_loras=2, max_num_seqs=8)
    tracker = drafter_of(llm).drafting.tracker  # type: ignore[union-attr]
    for seed in (1, 2):
        model = adapted(seed)
        model.save_pretrained(str(tmp_path / f"adapter{seed}"))
        request = LoRARequest(f"adapter{seed}", seed, str(tmp_path / f"adapter{seed}"))
        assert llm.llm_engine.add_lora(request)
        assert tracker.version == seed
        sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": PROMPT}] * 4, sampling, lora_request=request, use_tqdm=False)
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            for _ in range(24):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert completions(outputs) == [ids[0, len(PROMPT) :].tolist()] * 4
    assert sum(n for n, _ in drafter_of(llm).drafting.recorder.draft_counts().values()) > 0  # type: ignore[union-attr]
