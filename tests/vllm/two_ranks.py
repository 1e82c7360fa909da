"""One rank of a GRPO run whose server drafts: `torchrun -m tests.vllm.two_ranks WRAPPER POLICY ADDRESS GROUP_PORT FOLDER`.

Each rank writes what it got, and what it was told when somebody else had changed the server's weights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from atlas_rl import AtlasRolloutEngine
from examples.cpu_ranks import pretend
from tests.integrations.cpu_devices import options_of
from tests.trainers import build_trainer, word_tokenizer
from tests.vllm.served import loaded, logprobs_by
from tests.vllm_server import call


def main(wrapper: str, policy: Path, address: str, port: int, folder: Path) -> None:
    """Train two steps, then ask a server that somebody else has touched."""
    pretend(wrapper)
    trainer = build_trainer(
        "grpo",
        loaded(policy),
        word_tokenizer(),
        folder,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        vllm_mode="server",
        vllm_server_base_url=address,
        vllm_group_port=port,
        **options_of(wrapper),
    )
    engine = AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    rank, adapter = trainer.accelerator.process_index, trainer.vllm_generation
    completions: list[list[int]] = []
    errors: list[float] = []
    sharded: list[bool] = []
    generate = adapter.generate

    def compared(*args: Any, **kwargs: Any) -> Any:
        answer = generate(*args, **kwargs)
        sharded.append(isinstance(trainer.model_wrapped, FSDPModule))
        for prompt, completion, own in zip(*answer[:3], strict=True):
            expected = logprobs_by(trainer.accelerator.unwrap_model(trainer.model), prompt, completion)
            errors.append((expected - torch.tensor(own)[:, 0]).abs().max().item())
            completions.append(completion)
        return answer

    adapter.generate = compared
    trainer.train()
    torch.distributed.barrier()
    if rank == 0:
        call(address, "atlas_policy_updated")
    torch.distributed.barrier()
    logged = [row["atlas/num_tokens"] for row in trainer.state.log_history if "atlas/num_tokens" in row]
    written = {
        "versions": [report.policy_version for report in engine.reports],
        "num_requests": [report.num_requests for report in engine.reports],
        "completions": completions,
        "num_compared": len(errors),
        "error_nats": max(errors),
        "sharded": sharded,
        "logged": logged,
        "refused": refused(generate, [[2, 3]] * 4),
        "images": refused(generate, [[2, 3]] * 4, [["an image"]] * 4 if rank == 1 else None),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(written))
    torch.distributed.barrier()  # no rank leaves while the other still waits for it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DDP's reducer keeps gloo's threads; one that runs while the interpreter ends aborts the rank


def refused(generate: Any, prompts: list[list[int]], images: Any = None) -> str:
    """The error of a generation call."""
    try:
        generate(prompts, images, 4)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
