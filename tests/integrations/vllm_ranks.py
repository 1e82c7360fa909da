"""One of two gloo ranks with colocated vLLM engines: `torchrun -m tests.integrations.vllm_ranks FOLDER`.

Something is wrong on one of them when the engine is attached, and in the first sync. Then both train.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

from atlas_rl import AtlasRolloutEngine
from tests import vllm_engines
from tests.integrations.together_ranks import FAILING, raised
from tests.models import tiny_bigram
from tests.ranks import leave_together
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer

__all__ = ["vllm_engines"]


def build(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    return build_trainer(
        "grpo", model, word_tokenizer(), folder, ddp_backend="gloo", vllm_max_model_length=64, max_steps=2, **options
    )


def main(folder: Path) -> None:
    """Write what each case raises on this rank, and the reports of the run."""
    rank = int(os.environ["RANK"])
    fails, own = rank == FAILING, folder / f"of_rank{rank}"
    model = tiny_bigram(vocab=len(WORDS), hidden=64, heads=2, kv_heads=2, context=64, seed=1, logit_std=3.0)
    with_special_tokens(model).save_pretrained(own / "policy")
    word_tokenizer().save_pretrained(own / "policy")
    own_class = vllm_generation.LLM
    vllm_generation.LLM = functools.partial(own_class, enforce_eager=True, kv_cache_memory_bytes=64 << 20)
    trainer, seen = build(own), {}
    trainer.max_completion_length = 0 if fails else 12
    seen["option"] = raised(lambda: AtlasRolloutEngine(console=False, backend="vllm").attach(trainer))
    assert not trainer.use_vllm
    trainer.max_completion_length = 12
    engine = AtlasRolloutEngine(console=False, backend="vllm")
    engine.load_state_dict({"history": {"damaged": 1}} if fails else {})
    engine.attach(trainer)
    weight = trainer.model.get_output_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[3, 0] = float("nan") if fails else before[3, 0]
    seen["weights"] = raised(trainer.vllm_generation.sync_weights)
    with torch.no_grad():
        weight.copy_(before)
    seen["drafters"] = raised(trainer.vllm_generation.sync_weights)
    engine.load_state_dict({})
    trainer.train()
    reports = [report.to_dict() for report in engine.reports]
    (folder / f"rank{rank}.json").write_text(json.dumps(seen | {"reports": reports}))
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
