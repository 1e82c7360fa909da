"""Runs all GPU measurements, part by part; each part updates the output file.

python -m benchmarks.gpu.texts runs/gpu/texts.npz                       # where the demo is installed
python -m benchmarks.gpu.policy runs/gpu/texts.npz runs/gpu/policy     # on the GPU: 45 s
python -m benchmarks.gpu --policy runs/gpu/policy --texts runs/gpu/texts.npz
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, environment, write_result
from benchmarks.gpu import attention, decode, drafts, kernels
from benchmarks.gpu.policy import new_policy, texts

PARTS = ("attention", "graphs", "arms", "asked", "kernels", "drafts", "large", "autocast")
EOS = 2
_GENERATING = ("torch", "transformers", "triton", "numba", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--arms", nargs="+", help="instead of off, on and transformers' own generation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--commit", help="of the checkout, where there is no git")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "decode_gpu.json")
    args = parser.parse_args()
    payload: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"seconds": {}}
    payload |= environment(_GENERATING, args.commit)
    shared = Shared(args)
    for part in args.parts:
        began = time.perf_counter()
        payload[part] = getattr(shared, part)()
        payload["seconds"][part] = time.perf_counter() - began
        print(f"--- {part}: {payload['seconds'][part]:.1f} s", flush=True)
        write_result(args.output, payload)
    print(f"written: {args.output}")


class Shared:
    """The policy and engines that the parts share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.prompts = decode.Prompts(texts(args.texts, "asked"))
        self._warmed: set[str] = set()

    @cached_property
    def model(self) -> Any:
        return decode.load(self.args.policy)

    @cached_property
    def engines(self) -> dict[str, Any]:
        return decode.engines(self.model)

    def warmed(self, *names: str) -> dict[str, Any]:
        for name in names:
            if name in self.engines and name not in self._warmed:
                calls = 1 if name in ("off", "fp4") else 5
                decode.warm(self.engines[name], self.prompts, EOS, calls, self.args.max_new_tokens, 32)
                self._warmed.add(name)
        return self.engines

    def attention(self) -> list[dict[str, Any]]:
        return said(attention.rows(), ("backends", "mask", "first_ms", "again_ms", "torch_prefers"))

    def graphs(self) -> list[dict[str, Any]]:
        cells = [(1, 1), (8, 1), (8, 4), (32, 1), (32, 4), (128, 1)]
        return said([decode.step_and_graph(self.model, b, q, 160) for b, q in cells])

    def arms(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for batch in self.args.batches:
            extra = ["history", "recurrent", "fp4"] if batch == 8 else []
            arms = self.args.arms or ["off", "on", "transformers", *extra]
            own = self.warmed(*arms)
            rows += said(
                decode.cell(
                    self.model, own, self.prompts, EOS, batch, arms, self.args.repeats, self.args.max_new_tokens
                )
            )
        return rows

    def asked(self) -> list[dict[str, Any]]:
        rows = []
        for name in ("off", "history", "recurrent", "fp4"):
            engine = self.warmed(name)[name]
            rows.append({"arm": name, "batch": 8} | decode.asked_of_the_device(engine, self.prompts))
        return said(rows)

    def kernels(self) -> list[dict[str, Any]]:
        return said(kernels.rows())

    def drafts(self) -> list[dict[str, Any]]:
        return said(drafts.rows())

    def large(self) -> list[dict[str, Any]]:
        """Plain steps of larger policies with random weights, which give step times but no acceptance."""
        rows = []
        for size in ("1.7b", "8b"):
            model = new_policy(size, device="cuda", dtype=torch.bfloat16)
            rows += [{"size": size} | decode.step_and_graph(model, b, q, 512) for b, q in ((1, 1), (8, 4), (64, 1))]
            del model
            torch.cuda.empty_cache()
        return said(rows)

    def autocast(self) -> list[dict[str, Any]]:
        """The policy as TRL trains it: float32 weights, bf16 autocast."""
        model = decode.load(self.args.policy, torch.float32)
        own = {"off": decode.engines(model)["off"]}
        with torch.autocast("cuda", torch.bfloat16):
            rows = decode.cell(model, own, self.prompts, EOS, 8, ["off", "transformers"], 2, self.args.max_new_tokens)
            rows[0]["asked"] = decode.asked_of_the_device(own["off"], self.prompts)
        return said(rows)


def said(rows: list[dict[str, Any]], keys: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    for row in rows:
        shown = {key: row[key] for key in keys or row if key != "kernels_ms"}
        print({key: _short(value) for key, value in shown.items()}, flush=True)
    return rows


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return _short(value["median"]) if "median" in value else {k: _short(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
