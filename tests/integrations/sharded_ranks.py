"""One rank of several small runs, most of GRPO: `torchrun -m tests.integrations.sharded_ranks WRAPPER FOLDER`.

Every completion is compared, in the rank that made it, with what a single process without speculation draws from the whole
weights. Each rank writes what it saw. In the last run one rank raises while it generates.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from atlas_rl import AtlasRolloutEngine
from atlas_rl.integrations.trl.adapter import rollout_func
from atlas_rl.integrations.trl.whole_policy import reach_all_weights
from examples.cpu_ranks import pretend
from tests.integrations.cpu_devices import options_of
from tests.models import tiny_bigram
from tests.other_trainers import build_other
from tests.trainers import DATA, TRAINERS, WORDS, build_trainer, with_special_tokens, word_tokenizer

LONG, SHORT = 14, 3  # most tokens of a completion on rank 1 and on rank 0
WAYS = ("rollout_func", "attach")  # the first one finds no process group yet, in which ranks could see each other


def name_of(case: str, way: str) -> str:
    """Of a run's folder and of the files in which its ranks tell what they saw."""
    return case if way == "attach" else f"{case}_by_function"


def policy() -> Any:
    return with_special_tokens(tiny_bigram(vocab=len(WORDS), hidden=32, context=64, seed=1, logit_std=2.5))


def with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def saved_policy(folder: Path) -> str:
    """A folder of it, from which transformers loads it on rank 0 alone where FSDP is told so."""
    if PartialState().is_main_process:
        policy().save_pretrained(folder / "policy")
    torch.distributed.barrier()
    return str(folder / "policy")


def distinct_words(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs within almost every group."""
    return [float(len(set(completion.split()))) for completion in completions]


class Watched:
    """A trainer whose every generation call is compared with a single process.

    Args:
        wrapper: What spreads it over ranks.
        folder: Of its files.
        way: How it gets its engine, "attach" or "rollout_func".
        kind: Of `build_trainer` or `build_other`.
        kept: As for `options_of`.
        options: Of the trainer.
    """

    def __init__(
        self, wrapper: str, folder: Path, way: str, *, kind: str = "grpo", kept: bool = False, **options: Any
    ) -> None:
        for state in (AcceleratorState, GradientState):
            state._shared_state.clear()
        self.wrapper, self.way, self.peft = wrapper, way, bool(options.get("peft"))
        options = {"lr_scheduler_type": "constant"} | options_of(wrapper, kept=kept) | options
        options |= {"rollout_func": self.by_function} if way == "rollout_func" else {}
        self.engine = AtlasRolloutEngine(console=False, audit_share=0.2, output_dir=folder / "atlas", trace=True)
        self._rollout = self.engine.rollout
        self.engine.rollout = self.rollout  # type: ignore[method-assign]
        model = saved_policy(folder) if kept and wrapper == "fsdp2" else policy()
        output = folder / "trainer"
        if kind in TRAINERS:
            options["reward_funcs"] = distinct_words
            self.trainer = build_trainer(kind, model, word_tokenizer(), output, **options)
        else:
            # Ranks save what the trainer loads again, each for itself.
            output /= f"rank{os.environ['RANK']}"
            self.trainer = build_other(kind, output, model=model, **options)
        self.rank = int(self.trainer.accelerator.process_index)
        assert self.trainer.accelerator.num_processes == 2
        self.trainer.max_completion_length = LONG if self.rank else SHORT
        self.adapter: Any = None
        if way == "attach":
            self.engine.attach(self.trainer, baseline_every=2)
            self.watch(self.trainer.vllm_generation)
        self.calls: list[dict[str, Any]] = []
        self._sizes = {name: weight.numel() for name, weight in self.alone().named_parameters()}
        self._outputs: list[tuple[Any, ...]] = []
        self.seconds: list[dict[str, Any]] = []
        self._gathering: dict[str, Any] = {}
        self._rollouts_s = 0.0

    def by_function(self, prompts: Any, trainer: Any) -> Any:
        """The engine as `rollout_func`, whose adapter is made by the trainer's first call."""
        if self.adapter is None:
            self.watch(rollout_func(self.engine, trainer))
        return self.engine(prompts, trainer)

    def watch(self, adapter: Any) -> None:
        """Compare every call of this adapter."""
        self.adapter, self._generate, self._policy = adapter, adapter._generate, adapter._policy
        adapter._generate, adapter._policy = self.gathered, self.timed

    def alone(self) -> Any:
        """The policy in a single process."""
        return with_lora(policy()) if self.peft else policy()

    def gathered(self, prompts: Any) -> Any:
        """A generation call, compared with the weights of after it, which are brought together in another way.

        Not those of before it: reading them would shard what training has left gathered.
        """
        self._rollouts_s, self._outputs = 0.0, []
        began_s = time.perf_counter()
        output = self._generate(prompts)
        call_s, report = time.perf_counter() - began_s, output.report
        weights = whole_weights(self.trainer, self.wrapper)
        for each in self._outputs:
            self.compare(weights, *each)
        own = {"step": report.step, "mode": report.mode, "sync_s": report.sync_s, "generate_s": report.generate_s}
        self.seconds.append(self._gathering | own | {"call_s": call_s, "rollouts_s": self._rollouts_s})
        return output

    @contextmanager
    def timed(self) -> Iterator[Any]:
        """The context in which the policy is whole, with the seconds of making it so."""
        began_s = time.perf_counter()
        with self._policy() as model:
            entered_s = time.perf_counter()
            # A policy that is gathered later, in its forwards, would be in parts here.
            sizes = {name.replace("_fsdp_wrapped_module.", ""): p.numel() for name, p in model.named_parameters()}
            is_whole = sizes == self._sizes
            yield model
            left_s = time.perf_counter()
        gathering_s = time.perf_counter() - left_s + entered_s - began_s
        self._gathering = {"gathering_s": gathering_s, "is_whole": is_whole}

    def rollout(self, model: Any, prompts: Any, sampling: Any, **kwargs: Any) -> Any:
        """One of the engine, within that context."""
        began_s = time.perf_counter()
        output = self._rollout(model, prompts, sampling, **kwargs)
        self._rollouts_s += time.perf_counter() - began_s
        if kwargs.get("speculation") is not False:
            self._outputs.append((prompts, sampling, kwargs["mode"], output))
        return output

    def compare(self, weights: dict[str, torch.Tensor], prompts: Any, sampling: Any, mode: str, output: Any) -> None:
        """Note how many of a rollout's completions are a single process's."""
        alone = self.alone()
        alone.load_state_dict(weights)
        single = AtlasRolloutEngine(console=False, speculation=False, audit_share=0.0)
        expected = single.rollout(alone, prompts, sampling)
        same = [a == b for a, b in zip(output.completion_ids, expected.completion_ids, strict=True)]
        pairs = zip(output.logprobs, expected.logprobs, strict=True)
        worst = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
        total = float(sum(weight.double().abs().sum() for weight in weights.values()))
        self.calls.append(
            {
                "mode": mode,
                "same": sum(same),
                "completions": len(same),
                "logprob_error_nats": worst,
                "lengths": [len(row) for row in output.completion_ids],
                "drafted": sum(output.report.drafted.values()),
                "weights": total,
                "seed": sampling.seed,
            }
        )

    def summary(self) -> dict[str, Any]:
        """What the test reads."""
        learner = (self.engine._speculators or {})["recurrent"].learner  # type: ignore[attr-defined]
        weights = [part.detach().numpy() for name, part in learner.head.named_parameters() if name != "bias"]
        head = hashlib.sha256(b"".join(part.tobytes() for part in weights)).hexdigest()
        self.engine.policy_updated()  # the last step's rollouts are learned from as well
        history: Any = (self.engine._speculators or {})["history"]
        return {
            "way": self.way,
            "archived": history.num_archived_tokens,
            "head": head if learner.trained else "",
            "calls": self.calls,
            "seconds": self.seconds,
            "reports": [report.to_dict() for report in self.engine.reports],
            "log": self.trainer.state.log_history,
            "correction": getattr(self.trainer, "vllm_importance_sampling_correction", None),
        }


def whole_weights(trainer: Any, wrapper: str) -> dict[str, torch.Tensor]:
    """Copies of all weights of the policy, by the names that they have in a single process."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)

    def copies() -> dict[str, torch.Tensor]:
        return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in model.named_parameters()}

    if wrapper == "fsdp2":
        for module in trainer.model_wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    if wrapper == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False):
            return copies()
    if wrapper == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return copies()
    return copies()


def sent_wrong(trainer: Any, wrapper: str) -> list[str]:
    """Names of weights that TRL would not send to a vLLM engine as they are. TRL's own iteration runs, without vLLM."""
    sending = object.__new__(VLLMGeneration)
    sending.model = trainer.accelerator.unwrap_model(trainer.model_wrapped)  # the one that the trainer was built with
    sending.accelerator, sending._dist = trainer.accelerator, trainer._dist
    reach_all_weights(sending, trainer)
    sent = {name: weight.detach().clone() for name, weight in sending._iter_named_params()}
    weights = whole_weights(trainer, wrapper)
    return [name for name, weight in weights.items() if name not in sent or not torch.equal(sent[name], weight)]


def at_rest(trainer: Any) -> list[Any]:
    """What a generation call must put back."""
    zero3 = trainer._dist.is_zero3  # whose hooks are registered anew

    def hooks(module: Any) -> list[Any]:
        both = (module._forward_pre_hooks, module._forward_hooks)
        return [len(each) if zero3 else list(each) for each in both]

    modules = [
        (name, type(m).__name__, m.training, getattr(m, "gradient_checkpointing", None), "forward" in vars(m), hooks(m))
        for name, m in trainer.model_wrapped.named_modules()
    ]
    weights = [(name, type(p).__name__, p.requires_grad) for name, p in trainer.model_wrapped.named_parameters()]
    sizes = [p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model_wrapped.parameters()]
    return [*modules, *weights, *sizes]


class Interrupted(TrainerCallback):
    """After the first step a generation call raises on all ranks; the policy has to be as before."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.changed: list[str] = ["nothing raised"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        before = at_rest(self.watched.trainer)
        with raising(self.watched.engine), pytest.raises(RuntimeError, match="on purpose"):
            self.watched.adapter._generate([[2, 3, 4]])
        pairs = zip(before, at_rest(self.watched.trainer), strict=True)
        self.changed = [f"{old} became {new}" for old, new in pairs if old != new]


@contextmanager
def raising(engine: Any) -> Iterator[None]:
    """Inside, rollouts raise in the middle of their first forward."""
    own = engine.rollout

    def rollout(model: Any, *args: Any, **kwargs: Any) -> Any:
        def fail(*_: Any) -> None:
            raise RuntimeError("on purpose")

        handle = model.get_output_embeddings().register_forward_pre_hook(fail)
        try:
            return own(model, *args, **kwargs)
        finally:
            handle.remove()

    engine.rollout = rollout
    try:
        yield
    finally:
        engine.rollout = own


def full(wrapper: str, folder: Path, way: str) -> dict[str, Any]:
    """Evaluation, a call that raises, and a checkpoint from which another trainer goes on."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": DATA.select(range(8))}
    watched = Watched(wrapper, folder, way, **saving, **evaluated)
    interrupted = Interrupted(watched)
    watched.trainer.add_callback(interrupted)
    watched.trainer.train()
    resumed = Watched(wrapper, folder, way, **saving)
    resumed.trainer.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-2"))
    return watched.summary() | {"changed": interrupted.changed, "resumed": resumed.summary()}


def lora(wrapper: str, folder: Path, way: str) -> dict[str, Any]:
    """Adapters, with activations checkpointed."""
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    watched = Watched(wrapper, folder, way, peft=True, max_steps=2, **checkpointing)
    interrupted = Interrupted(watched)
    watched.trainer.add_callback(interrupted)
    watched.trainer.train()
    return watched.summary() | {"changed": interrupted.changed}


def kept(wrapper: str, folder: Path, way: str) -> dict[str, Any]:
    """Weights that training and evaluation keep gathered after a forward; with FSDP2, loaded on rank 0 alone.

    Each run begins with an evaluation. With `rollout_func` that makes the adapter.
    """
    evaluated = {"eval_on_start": True, "eval_dataset": DATA.select(range(8))}
    watched = Watched(wrapper, folder, way, kept=True, max_steps=2, **evaluated)
    watched.trainer.train()
    watched.trainer.evaluate()
    unsent = sent_wrong(watched.trainer, wrapper)
    watched.trainer.evaluate()
    watched.trainer.train()
    return watched.summary() | {"sent_wrong": unsent}


def rloo(wrapper: str, folder: Path, way: str) -> dict[str, Any]:
    """A trainer without importance-sampling correction."""
    watched = Watched(wrapper, folder, way, kind="rloo", max_steps=2)
    watched.trainer.train()
    return watched.summary()


def distillation(wrapper: str, folder: Path, way: str) -> dict[str, Any]:
    """A trainer with a second model, its teacher."""
    watched = Watched(wrapper, folder, way, kind="distillation", max_steps=2)
    watched.trainer.train()
    return watched.summary()


def evaluated_before_training(folder: Path, way: str) -> None:
    """By DDP: transformers would then train every rank apart from the others."""
    watched = Watched("ddp", folder, way, eval_dataset=DATA, per_device_eval_batch_size=4)
    watched.trainer.evaluate()
    with pytest.raises(RuntimeError, match="2 ranks would train without exchanging gradients"):
        watched.trainer.train()


def one_raises(wrapper: str, folder: Path, way: str) -> dict[str, Any]:
    """Rank 1 raises while it generates: this run ends, on both ranks."""
    watched = Watched(wrapper, folder, way, max_steps=3)
    with raising(watched.engine) if watched.rank else nothing():
        watched.trainer.train()
    return {}


@contextmanager
def nothing() -> Iterator[None]:
    yield


def main(wrapper: str, folder: Path) -> None:
    pretend(wrapper)
    if wrapper == "ddp":
        for way in WAYS:
            evaluated_before_training(folder / name_of("evaluated", way), way)
    cases = [full, lora, *([kept] if wrapper.startswith("fsdp") else [])]
    runs = [(case, way) for way in WAYS for case in cases]
    for case, way in [*runs, *((case, "attach") for case in (rloo, distillation, one_raises))]:
        name = name_of(case.__name__, way)
        summary = case(wrapper, folder / name, way)
        rank = PartialState().process_index
        (folder / f"{name}.rank{rank}.json").write_text(json.dumps(summary))
        torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = 1
    try:
        main(sys.argv[1], Path(sys.argv[2]))
        code = 0
    finally:
        if code:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # DDP's reducer keeps gloo's threads; one that runs while the interpreter ends aborts the rank
