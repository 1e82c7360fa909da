"""One rank of a GRPO run whose server drafts: `torchrun -m tests.vllm.two_ranks WRAPPER POLICY ADDRESS GROUP_PORT FOLDER`.

WRAPPER spreads the trainer over ranks: see `options_of`; with "+lora" it trains adapters. Each rank writes what it got,
and what it was told when somebody else had changed the server's weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from atlas_rl import AtlasRolloutEngine
from examples.cpu_ranks import pretend
from tests.integrations.cpu_devices import options_of
from tests.integrations.sharded_ranks import whole_weights, with_lora
from tests.ranks import leave_together
from tests.trainers import build_trainer, word_tokenizer
from tests.vllm.served import loaded, logprobs_by
from tests.vllm_server import call


def timed(owner: Any, name: str) -> list[float]:
    """A list that gets the seconds of every call of a method."""
    own, seconds = getattr(owner, name), []

    def measured(*args: Any, **kwargs: Any) -> Any:
        began_s = time.perf_counter()
        result = own(*args, **kwargs)
        seconds.append(time.perf_counter() - began_s)
        return result

    setattr(owner, name, measured)
    return seconds


def build(wrapper: str, policy: Path, address: str, port: int, folder: Path, *, peft: bool) -> Any:
    return build_trainer(
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
        peft=peft,
        **options_of(wrapper),
    )


def main(wrapper: str, policy: Path, address: str, port: int, folder: Path) -> None:
    """Train two steps, then ask a server that somebody else has touched."""
    wrapper, _, peft = wrapper.partition("+")
    pretend(wrapper)
    alone = with_lora(loaded(policy)) if peft else loaded(policy)  # before ZeRO-3, which would load it in shards
    trainer = build(wrapper, policy, address, port, folder, peft=bool(peft))
    engine = AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    rank, adapter = trainer.accelerator.process_index, trainer.vllm_generation
    completions: list[list[int]] = []
    errors: list[float] = []
    weights: list[float] = []
    sent, waited = timed(adapter.generation, "sync_weights"), timed(adapter, "sync_weights")
    generate = adapter.generate

    def compared(*args: Any, **kwargs: Any) -> Any:
        alone.load_state_dict(whole_weights(trainer, wrapper))  # brought together in another way than TRL does
        weights.append(float(sum(weight.double().abs().sum() for weight in alone.parameters())))
        answer = generate(*args, **kwargs)
        for prompt, completion, own in zip(*answer[:3], strict=True):
            expected = logprobs_by(alone, prompt, completion)
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
        "moved": abs(weights[1] - weights[0]),
        "seconds": [
            (sent_s, report.sync_s + report.refresh_s, waited_s)
            for report, sent_s, waited_s in zip(engine.reports, sent, waited, strict=False)  # rank 1 has no reports
        ],
        "logged": logged,
        "refused": refused,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(written))
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
