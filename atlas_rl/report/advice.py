"""Every warning of the library, with its cause and what to do.

The page of a run says what to do about the warnings of its reports, and `docs/warnings.md` is made of this file. A test
reads the sources and finds a warning that is missing here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Explained:
    """A warning and what to do about it.

    Attributes:
        says: Its words, or enough of them to know it by; three dots stand for what varies.
        cause: Why it comes.
        cure: What to do.
    """

    says: str
    cause: str
    cure: str

    def fits(self, warning: str) -> bool:
        """Whether a warning matches this entry."""
        pattern = ".*".join(map(re.escape, self.says.split("...")))
        return re.search(pattern, warning, re.DOTALL) is not None


REPORTED: tuple[Explained, ...] = (
    Explained(
        "none of ... verified drafts was accepted; its state was lost or belongs to another policy or tokenizer",
        "At least 200 draft tokens of a drafter were verified in one step, and none was accepted.",
        "If a saved state was loaded, check that it belongs to this policy and tokenizer. For your own drafter, check that "
        "its tokens are the policy's. This costs only speed.",
    ),
    Explained(
        "asked for drafts during the whole step and proposed none",
        "The drafter found nothing to draft, or is broken.",
        "In the first steps a drafter may have nothing to draft yet. If this continues, remove it from `speculators`.",
    ),
    Explained(
        "memory for the attention cache ran short: ... times a request gave its row up and was run again later",
        "The texts outgrew the memory in the middle of a call. The shortest requests waited, and their cache was "
        "recomputed.",
        "Set `max_batch_size` lower, or leave the engine more memory. The tokens are correct; the step was slower.",
    ),
    Explained(
        "the policy's logits are not finite (NaN or infinite) at some position",
        "In vLLM the policy's logits were not a distribution. In process the call raises an error instead.",
        "Stop the training: the policy's weights hold NaN or infinity. Go back to a checkpoint and lower the learning "
        "rate, or look for an overflow in half precision.",
    ),
    Explained(
        "audit: ... have probability 0 under the policy's processed distribution",
        "The engine ignores top-k, top-p or min-p, or samples from other weights.",
        "Stop the training and compare temperature, top-k, top-p and min-p of engine and trainer, and check "
        "that new weights reach the engine.",
    ),
    Explained(
        "audit: ... are not the policy's choice",
        "The engine's forward pass or its sampler differs from the policy's: the noise is known, and picks another token.",
        "Check that new weights reach the engine. If they do, the engine's forward differs from the policy's: please report "
        "it with the policy's class and versions.",
    ),
    Explained(
        "audit: returned logprobs differ from a plain forward pass ... logprobs_mode='processed_logprobs'",
        "vLLM returns the logprobs before temperature and truncation.",
        "Set vLLM's `logprobs_mode='processed_logprobs'`.",
    ),
    Explained(
        "audit: returned logprobs differ from a plain forward pass",
        "The engine holds other weights than the policy, or samples from another distribution.",
        "Check that new weights reach the engine after every update, and that engine and trainer sample alike.",
    ),
    Explained(
        "audit: the sampled tokens are not drawn from the policy",
        "The run's evidence against the sampler reached a million to one.",
        "Stop the training and compare the sampling options of engine and trainer. docs/audit.md explains each finding.",
    ),
    Explained(
        "...: ...() raised ...; it is off until the next policy update",
        "A drafter or the controller failed; `drafter_faults` counts how often.",
        "The log has the traceback. The tokens are correct, and the step was slower. Fix your own drafter; please report "
        "errors of ours.",
    ),
    Explained(
        "...: ...() raised ...; it drafts on, and its learning in idle time has ended",
        "A drafter failed while it learned in a server's idle time, for example because the device's memory ran out.",
        "The log has the traceback. If memory ran out, lower `--gpu-memory-utilization`, or start the server with "
        "`--idle-learning off`. Please report other errors of ours.",
    ),
    Explained(
        "drafting: ...() raised ...; running requests get no more drafts",
        "Following vLLM's requests failed. Requests that begin later are drafted for again.",
        "The log has the traceback. The tokens are correct, and the step was slower. Please report it.",
    ),
    Explained(
        "...: its tensors changed between two calls, though nobody trained them",
        "vLLM's sleep level 2 discarded them, or other code overwrote them.",
        "Use vLLM's sleep level 1, or send new weights after waking, so that the drafters are refreshed.",
    ),
    Explained(
        "speculation is silently disabled",
        "Drafts were given to vLLM and none was verified, or vLLM decoded and never requested any.",
        "Compare vLLM's options with docs/vllm.md: some option keeps vLLM from verifying drafts.",
    ),
    Explained(
        "accepted length collapsed to 1.00: none of its last ... drafts was accepted",
        "Its drafts used to be accepted and no longer are: it does not follow the policy any more.",
        "Call `policy_updated()` (or `load_weights`) after every optimizer step, so that the drafters follow the policy.",
    ),
    Explained(
        "completions differ from the rerun without speculation",
        "`baseline_every` generated the same prompts again and got different tokens. Batches of different shapes round "
        "differently, so near-ties can go either way.",
        "In float16 and bfloat16 a few differences are expected. In float32 please report it with the policy's class and "
        "versions.",
    ),
    Explained(
        "the server generated ... tokens for others meanwhile: its figures of drafting and its seconds count them",
        "The trainer's server also answered other clients during the step.",
        "Give the trainer its own server. Its tokens are correct; only the drafting figures and the rate include others.",
    ),
)
"""Warnings of reports, which the console prints below the step's line. The first that fits holds."""

LOGGED: tuple[Explained, ...] = (
    Explained(
        "importance-sampling correction is switched off and its forward pass spared",
        "The sampled logprobs agree with the trainer's own forward, so the correction multiplies by one.",
        "Nothing: it saves a forward per step. `spare_importance_sampling=False` leaves the correction on.",
    ),
    Explained(
        "importance-sampling correction kept",
        "The sampled logprobs differ from the trainer's own forward, or belong to another distribution; the message says "
        "which.",
        "Nothing, if one of your settings is the reason. Else compare sampling options and precision of policy and trainer.",
    ),
    Explained(
        "importance-sampling correction switched on again",
        "Sampling options changed during the run, so samples no longer come from the distribution that the trainer scores.",
        "Nothing, if the change was intended.",
    ),
    Explained(
        "rollouts are sampled at temperature ..., and scored at ..., with which ... was built",
        "`trainer.temperature` or `generation_kwargs` changes what is sampled. GRPO and RLOO go on scoring at the "
        "temperature of their configuration, and this trainer has no importance-sampling correction.",
        "Set the temperature in the trainer's configuration. For a schedule use an attached `GRPOTrainer` with its "
        "correction.",
    ),
    Explained(
        "... made its first training step without asking the engine for rollouts",
        "The trainer generates in its own code, so the engine does nothing.",
        "Let that code call the trainer's standard generation, or do not attach an engine.",
    ),
    Explained(
        "a call of model.generate is left to transformers, without speculation or report, because",
        "The call uses an option that the engine does not support; the message names it.",
        "Nothing, or change that option. docs/trainers.md lists supported calls.",
    ),
    Explained(
        "holds no drafter state (...): drafters start afresh",
        "The run resumes from a checkpoint that was saved without the engine.",
        "Nothing: the drafters learn again. It costs speed in the first steps.",
    ),
    Explained(
        "the saved state of the drafter '...' is ignored: ... It starts afresh",
        "The state of this drafter is damaged, or belongs to another format or policy.",
        "Nothing: it learns again. Check the file if it should be intact.",
    ),
    Explained(
        "All drafters start afresh",
        "The file of the drafters' state is damaged or has another format; the message says which.",
        "Nothing: they learn again. Check the file if it should be intact.",
    ),
    Explained(
        "the state has speculators ... that this engine lacks; it has ...",
        "The state was saved by an engine with other drafters.",
        "Give this engine the same drafters (`draft_model`, `speculators`) if it should have them.",
    ),
    Explained(
        "the drafters' state is not saved",
        "Your own drafter returns a state that cannot be written: only nested mappings of tensors, arrays, numbers and text "
        "are supported.",
        "Change its `state_dict`. The training continues.",
    ),
    Explained(
        "nothing of the drafter '...' is saved",
        "The drafter's `state_dict` raised while a checkpoint was saved. The log has its traceback.",
        "Fix your own drafter; please report errors of ours. A run that resumes from this checkpoint says so again.",
    ),
    Explained(
        "a ... was lost (...). Generation goes on",
        "A report line, trace line, printed line or drafters' state could not be written.",
        "Free disk space, or reconnect the disk. `engine.lost_writes` counts lost writes.",
    ),
    Explained(
        "is recorded with ... of ... requests: the states of the others are not complete",
        "An engine did not run some prompts of the call whole, so a recording with `layers` lacks their states.",
        "With vLLM, record with `enable_prefix_caching=False`. The requests that are recorded are complete.",
    ),
    Explained(
        "writing a ... works again; ... were lost",
        "Writing to the disk works again.",
        "Nothing: the message says how many were lost.",
    ),
    Explained(
        "...: ...() raised; generation goes on without it",
        "The same fault as in the report, with its traceback.",
        "Fix your own drafter; please report errors of ours.",
    ),
    Explained(
        "idle_learning is on, but drafters cannot learn in idle time",
        "The server has several data-parallel replicas, or its vLLM is older than 0.32.",
        "Leave `--idle-learning on` out. Drafters learn as without it.",
    ),
    Explained(
        "the history index holds tokens up to ..., the policy now has ...: it starts from nothing",
        "The policy's vocabulary shrank, or the index belongs to another policy.",
        "Check that the drafters' state belongs to this policy.",
    ),
    Explained(
        "the policy now has ... tokens and hidden size ... instead of ...: the recurrent drafter starts from nothing",
        "The policy was replaced or resized during the run.",
        "Nothing, if that was intended: it learns again.",
    ),
    Explained(
        "the saved recurrent drafter belongs to a policy of ... tokens and hidden size",
        "The drafters' state belongs to a policy of other sizes.",
        "Load a state of this policy, or none.",
    ),
    Explained(
        "the policy's logits are not a scaled or capped output of its LM head: the ... cannot learn them",
        "The policy computes its logits in a way that drafters that learn cannot follow.",
        "Nothing. The recurrent drafter drafts nothing, and an adaptive EAGLE-3 head drafts as it was loaded: its "
        "acceptance may fall as the policy changes.",
    ),
    Explained(
        "the saved adaptive EAGLE-3 head drafts other tokens than the given one",
        "The drafters' state was saved with a head of another reduced vocabulary.",
        "Load the head that the state was saved with. Else the given head starts as it was trained.",
    ),
    Explained(
        "a refresh of the adaptive EAGLE-3 head is undone",
        "The refresh lowered the head's agreement with the policy, or made weights that are not finite.",
        "Nothing, if it is rare: the head drafts with the weights from before. If it repeats, please report it.",
    ),
    Explained(
        "cannot determine what ... makes of its LM head's output",
        "The policy's forward failed on a test of its computation after the LM head.",
        "Nothing, if acceptance is as usual. The drafters follow its configuration instead.",
    ),
    Explained(
        "the logits of ... are not what its LM head and ... make: drafters that learn may draft badly",
        "vLLM's class of the policy changes its logits in a way that the drafters cannot reproduce.",
        "Nothing, if acceptance is as usual. Please report the policy's class.",
    ),
    Explained(
        "... has ... MTP layers: the first drafts every token, the others are not used",
        "The policy's checkpoint has several layers for multi-token prediction, one for each token ahead.",
        "Nothing: the first one drafts further tokens from what it made of the one before.",
    ),
    Explained(
        "on a CPU the four-bit copy of the policy is dequantized",
        'Without a GPU, drafting with `draft_model="fp4"` costs as much as the policy.',
        'Leave `draft_model="fp4"` out on a CPU.',
    ),
    Explained(
        "... runs its norms, rotary embeddings and gates unfused, in several operations each",
        "The policy fails the engine's test with fused norms, rotary embeddings and gates, and passes it without.",
        "Nothing: its steps are somewhat slower. Please report the policy's class and versions.",
    ),
    Explained(
        "cannot run as a CUDA graph",
        "The policy's forward does something that a CUDA graph does not support, or the GPU or torch lacks the attention "
        "that steps of fixed shapes need; the message has the reason.",
        "Nothing, or remove the reason: load a float32 policy in bfloat16, or set the trainer's bf16=True. "
        "Its decode steps are launched kernel by kernel.",
    ),
    Explained(
        "decode steps are captured as CUDA graphs, but verification cannot be part of them",
        "The GPU or torch refused the graph of a decode step with the verification of its drafts; the message has the "
        "reason.",
        "Nothing: verification is launched behind each step, which takes a fraction of a millisecond longer. Please report "
        "the reason.",
    ),
    Explained(
        "had no memory left for the CUDA graph of a decode step",
        "The device's memory ran out while a decode step was captured. The call goes on without captured steps; the next "
        "one tries again.",
        "Nothing if it comes once. If every run says so, lower `max_batch_size`, or leave more device memory free.",
    ),
    Explained(
        "drafts of the recurrent head cannot be captured as CUDA graphs",
        "The GPU or torch refused the graph of a draft; the message has the reason.",
        "Nothing: its drafts are launched kernel by kernel, which takes a fraction of a millisecond longer. Please report "
        "the reason.",
    ),
    Explained(
        "no memory was left for the CUDA graph of a draft",
        "The device's memory ran out while a draft was captured. The call goes on without captured drafts; the next one "
        "tries again.",
        "Nothing if it comes once. If every run says so, lower `max_batch_size`, or leave more device memory free.",
    ),
    Explained(
        "compiling its ... kernels, once per machine",
        "The first run on a machine, or of a new version, compiles its kernels.",
        "Wait. The kernels are cached in `~/.cache/atlas_rl`, or in `ATLAS_RL_CACHE`.",
    ),
    Explained(
        "compiled its ... kernels in ... s; they are cached for the next run",
        "Compilation has finished.",
        "Nothing. If every run says so, the cache folder is lost between runs: set `ATLAS_RL_CACHE`.",
    ),
    Explained(
        "skipped ... half-written or damaged lines",
        "A run that was killed, or a full disk, leaves half a line in `rollouts.jsonl`.",
        "Nothing: the other lines are read.",
    ),
)
"""Warnings of Python's `logging`, all below the loggers `atlas_rl`, and of `warnings`."""

UNKNOWN = "The sentence names the cause. docs/warnings.md has a list."


def advice_for(warning: str) -> str:
    """What to do about a report's warning; `UNKNOWN` for an unlisted one, such as a later version's."""
    return next((each.cure for each in REPORTED if each.fits(warning)), UNKNOWN)
