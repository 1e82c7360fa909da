"""One rank of a GRPO run whose server drafts: `torchrun -m tests.vllm.two_ranks POLICY ADDRESS GROUP_PORT FOLDER`.

Each rank writes what it got, and what it was told when somebody else had changed the server's weights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from atlas_rl import AtlasRolloutEngine
from tests.trainers import build_trainer, word_tokenizer
from tests.vllm_server import call


def main(policy: str, address: str, port: int, folder: Path) -> None:
    """Train two steps, then ask a server that somebody else has touched."""
    trainer = build_trainer(
        "grpo",
        AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        word_tokenizer(),
        folder,
        ddp_backend="gloo",
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        vllm_mode="server",
        vllm_server_base_url=address,
        vllm_group_port=port,
    )
    engine = AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    rank, adapter = trainer.accelerator.process_index, trainer.vllm_generation
    completions: list[list[int]] = []
    errors: list[float] = []
    generate = adapter.generate

    def compared(*args: Any, **kwargs: Any) -> Any:
        answer = generate(*args, **kwargs)
        for prompt, completion, own in zip(*answer[:3], strict=True):
            with torch.no_grad():
                logits = trainer.accelerator.unwrap_model(trainer.model)(torch.tensor([[*prompt, *completion]])).logits
            each = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            expected = each.gather(1, torch.tensor(completion)[:, None])[:, 0]
            errors.append((expected - torch.tensor(own)[:, 0]).abs().max().item())
            completions.append(completion)
        return answer

    adapter.generate = compared
    trainer.train()
    torch.distributed.barrier()
    if rank == 0:
        call(address, "atlas_policy_updated")
    torch.distributed.barrier()
    try:
        generate([[2, 3]] * 4, None, 4)
        refused = "nothing"
    except RuntimeError as error:
        refused = str(error)
    logged = [row["atlas/num_tokens"] for row in trainer.state.log_history if "atlas/num_tokens" in row]
    written = {
        "versions": [report.policy_version for report in engine.reports],
        "num_requests": [report.num_requests for report in engine.reports],
        "completions": completions,
        "num_compared": len(errors),
        "error_nats": max(errors),
        "logged": logged,
        "refused": refused,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(written))
    torch.distributed.barrier()  # no rank leaves while the other still waits for it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DDP's reducer keeps gloo's threads; one that runs while the interpreter ends aborts the rank


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
