"""Makes a policy of a real architecture and size, trained for a minute on the demo's written solutions.

Nothing can be downloaded on a bare machine, and a policy of random weights accepts no draft. One that has learned to write
the demo's solutions has an entropy like a policy in training, and drafts are accepted for the reasons that they are there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB = 151_936
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "layers": 28, "heads": 16, "kv_heads": 8},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "layers": 28, "heads": 16, "kv_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "layers": 36, "heads": 32, "kv_heads": 8, "tied": False},
}


def new_policy(size: str, vocab: int = VOCAB, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Qwen3 of this size (arXiv 2505.09388, table 1) with random weights."""
    own = SIZES[size]
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=own["hidden_size"],
        intermediate_size=own["intermediate_size"],
        num_hidden_layers=own["layers"],
        num_attention_heads=own["heads"],
        num_key_value_heads=own["kv_heads"],
        head_dim=own.get("head_dim", 128),
        max_position_embeddings=40_960,
        tie_word_embeddings=own.get("tied", True),
    )
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            return Qwen3ForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)


def texts(path: Path, name: str) -> list[list[int]]:
    """Token ids of `trained` (tasks with solutions) or `asked` (tasks alone) of a file of `benchmarks.gpu.texts`."""
    loaded = np.load(path)
    ends = np.cumsum(loaded[f"{name}_lengths"])[:-1]
    return [row.astype(int).tolist() for row in np.split(loaded[name], ends)]


def train(model: Any, rows: list[list[int]], seconds: float, batch_tokens: int, device: str) -> list[float]:
    """Next-token training over packed rows until time is up; returns the losses."""
    stream = torch.tensor([token for row in rows for token in row], device=device)
    length = 512 if batch_tokens >= 512 else batch_tokens
    model.train().to(device)
    model.gradient_checkpointing_disable()
    fused = device != "cpu"
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)
    generator = torch.Generator().manual_seed(1)
    losses: list[float] = []
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        share = spent / seconds
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, (len(losses) + 1) / 30) * (1 - 0.95 * share)
        starts = torch.randint(len(stream) - length - 1, (batch_tokens // length,), generator=generator)
        ids = torch.stack([stream[s : s + length + 1] for s in starts.tolist()])
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            states = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(states.reshape(-1, states.shape[-1]))
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", default="0.6b", choices=SIZES)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_policy(args.size, args.vocab, device)
    losses = train(model, texts(args.texts, "trained"), args.seconds, args.batch_tokens, device)
    print(
        f"{len(losses)} steps of {args.batch_tokens} tokens, loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.3f} nats"
    )
    model.to(torch.bfloat16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
