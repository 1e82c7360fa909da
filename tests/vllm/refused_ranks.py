"""One of two gloo ranks whose servers cannot be used: `torchrun -m tests.vllm.refused_ranks FOLDER ADDRESS...`.

At each address a trainer is built that connects to it, and one that an engine is attached to. Each rank writes what they
raise. A rank that waited for the other would never write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl.generation import vllm_generation

from atlas_rl import AtlasRolloutEngine
from atlas_rl.integrations.trl.together import of_all_ranks
from tests.models import tiny_llama
from tests.ranks import leave_together
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer


def raised(call: Callable[[], object]) -> str:
    """The kind and the message of what a call raises."""
    try:
        call()
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path, addresses: list[str]) -> None:
    """Try both ways of connecting at each address."""
    told, trainer = [], None
    own = (vllm_generation.VLLMClient, vllm_generation.VLLMGeneration._init_vllm)
    for address in addresses:

        def build(at: str = address, **options: Any) -> Any:
            return build_trainer(
                "grpo",
                with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64)),
                word_tokenizer(),
                folder,
                ddp_backend="gloo",
                vllm_mode="server",
                vllm_server_base_url=at,
                vllm_server_timeout=0.0,
                **options,
            )

        engine = AtlasRolloutEngine(console=False)
        with engine.prepare_vllm():
            told.append(raised(lambda: build(use_vllm=True)))
        trainer = build()
        attach = AtlasRolloutEngine(backend="vllm", console=False).attach
        told.append(raised(lambda: attach(trainer)))  # noqa: B023 - called at once
        assert not trainer.use_vllm
    assert own == (vllm_generation.VLLMClient, vllm_generation.VLLMGeneration._init_vllm), "TRL is as it was"
    assert trainer is not None
    rank = trainer.accelerator.process_index
    in_step = of_all_ranks(trainer.accelerator, "counting", lambda: rank)
    (folder / f"rank{rank}.json").write_text(json.dumps({"raised": told, "in_step": in_step}))
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
