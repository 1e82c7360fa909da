"""Every warning of the library: its words, its cause, and what to do.

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
        """Whether a warning says this."""
        pattern = ".*".join(map(re.escape, self.says.split("...")))
        return re.search(pattern, warning, re.DOTALL) is not None


REPORTED: tuple[Explained, ...] = (
    Explained(
        "none of ... verified drafts was accepted; its state was lost or belongs to another policy or tokenizer",
        "At least 200 draft tokens of a drafter were verified in one step, and none was accepted.",
        "If a saved state was loaded, check that it is of this policy and tokenizer. A drafter of your own: check that its "
        "tokens are the policy's. It costs speed only.",
    ),
    Explained(
        "asked for drafts during the whole step and proposed none",
        "The drafter has nothing to say, or is broken.",
        "Take this drafter out of `speculators` if it goes on. In the first steps a drafter may have nothing to say yet.",
    ),
    Explained(
        "memory for the attention cache ran short: ... times a request gave its row up and was run again later",
        "The texts outgrew the memory in the middle of a call. The shortest requests waited, and their cache was computed "
        "again.",
        "Set `max_batch_size` lower, or leave the engine more memory. The tokens are right; the step was slower.",
    ),
    Explained(
        "the policy's logits are not finite (NaN or infinite) at some position",
        "In vLLM the policy gave logits that are no distribution. In process the call raises an error instead.",
        "Stop the training: the policy's weights hold NaN or infinity. Go back to a checkpoint and lower the learning "
        "rate, or look for an overflow in half precision.",
    ),
    Explained(
        "audit: ... have probability 0 under the policy's processed distribution",
        "The engine ignores top-k, top-p or min-p, or samples from other weights.",
        "Stop and look before training on: compare temperature, top-k, top-p and min-p of engine and trainer, and check "
        "that new weights reach the engine.",
    ),
    Explained(
        "audit: ... are not the policy's choice",
        "The engine's forward pass or its sampler differs from the policy's: the noise is known, and picks another token.",
        "Check that new weights reach the engine. If they do, please report it with the policy's class and versions: the "
        "engine's forward differs from the policy's.",
    ),
    Explained(
        "audit: returned logprobs differ from a plain forward pass ... logprobs_mode='processed_logprobs'",
        "vLLM returns logprobs from before temperature and truncation.",
        "Set vLLM's `logprobs_mode='processed_logprobs'`.",
    ),
    Explained(
        "audit: returned logprobs differ from a plain forward pass",
        "The engine holds other weights than the policy, or samples from another distribution.",
        "Check that new weights reach the engine after every update, and that engine and trainer sample alike.",
    ),
    Explained(
        "audit: the sampled tokens are not drawn from the policy",
        "The evidence of the run against the sampler reached a million to one.",
        "Stop and look before training on: docs/audit.md says what each finding means. Compare the sampling options of "
        "engine and trainer.",
    ),
    Explained(
        "...: ...() raised ...; it is off until the next policy update",
        "A drafter, the controller, or following vLLM's requests failed; `drafter_faults` counts how often.",
        "The log has the traceback. The tokens are right, and the step was slower. For a drafter of your own: repair it; "
        "for one of ours: please report it.",
    ),
    Explained(
        "...: its tensors changed between two calls, though nobody trained them",
        "vLLM's sleep level 2 took them, or something overwrote them.",
        "Use vLLM's sleep level 1, or send new weights after waking, so that the drafters are refreshed.",
    ),
    Explained(
        "speculation is silently disabled",
        "Drafts were handed to vLLM and none was verified, or vLLM decoded and never asked for any.",
        "Compare vLLM's options with docs/vllm.md: something in them keeps vLLM from verifying drafts.",
    ),
    Explained(
        "accepted length collapsed to 1.00: none of ... drafts was accepted",
        "The drafter used to be accepted and no longer is: it does not follow the policy any more.",
        "Call `policy_updated()` (or `load_weights`) after every optimizer step, so that the drafters follow the policy.",
    ),
    Explained(
        "completions differ from the rerun without speculation",
        "`baseline_every` generated the same prompts again, and other tokens came. Batches of other shapes round "
        "differently, so near-ties may fall either way.",
        "In float16 and bfloat16 a few are expected. In float32 please report it with the policy's class and versions.",
    ),
    Explained(
        "the server generated ... tokens for others meanwhile: its figures of drafting and its seconds count them",
        "The trainer's server also answered other clients during the step.",
        "Give the trainer a server of its own. Its tokens are right; only the figures of drafting and the rate are mixed.",
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
        "The sampled logprobs differ from the trainer's own forward, or are of another distribution; the message says "
        "which.",
        "Nothing, if the reason is a setting of yours. Else compare sampling options and precision of policy and trainer.",
    ),
    Explained(
        "importance-sampling correction switched on again",
        "Sampling options changed during the run, so that samples are no longer drawn from what the trainer scores.",
        "Nothing, if the change was meant.",
    ),
    Explained(
        "... made its first training step without asking the engine for rollouts",
        "The trainer generates in code of its own, so the engine does nothing.",
        "Let that code call the trainer's own generation, or do not attach an engine.",
    ),
    Explained(
        "a call of model.generate is left to transformers, without speculation or report, because",
        "The call asks for what the engine does not do; the message says what.",
        "Nothing, or change what the message names. docs/trainers.md says what is served.",
    ),
    Explained(
        "holds no drafter state (...): drafters start afresh",
        "The run resumes from a checkpoint that was saved without the engine.",
        "Nothing: the drafters learn again. It costs speed in the first steps.",
    ),
    Explained(
        "the saved state of the drafter '...' is left: ... It starts afresh",
        "The state of this drafter is damaged, of another format, or of another policy.",
        "Nothing: it learns again. Check the file if it should be whole.",
    ),
    Explained(
        "All drafters start afresh",
        "The file of the drafters' state is damaged or of another format; the message says which.",
        "Nothing: they learn again. Check the file if it should be whole.",
    ),
    Explained(
        "the state has speculators ... that this engine lacks; it has ...",
        "The state was saved by an engine with other drafters.",
        "Give this engine the same drafters (`draft_model`, `speculators`) if it should have them.",
    ),
    Explained(
        "the drafters' state is not saved",
        "A drafter of your own returns a state that cannot be written: anything but nested mappings of tensors, arrays, "
        "numbers and text.",
        "Change its `state_dict`. The training goes on.",
    ),
    Explained(
        "a ... was lost (...). Generation goes on",
        "The disk did not take a line of a report, a trace, a printed line or a drafters' state.",
        "Make room, or give the disk back. `engine.lost_writes` counts what is lost.",
    ),
    Explained(
        "writing a ... works again; ... were lost",
        "The disk takes writes again.",
        "Nothing: the message says how many were lost.",
    ),
    Explained(
        "...: ...() raised; generation goes on without it",
        "The same fault as in the report, with its traceback.",
        "For a drafter of your own: repair it; for one of ours: please report it.",
    ),
    Explained(
        "the history index holds tokens up to ..., the policy now has ...: it starts from nothing",
        "The policy's vocabulary shrank, or the index belongs to another policy.",
        "Check that the drafters' state is of this policy.",
    ),
    Explained(
        "the policy now has ... tokens and hidden size ... instead of ...: the recurrent drafter starts from nothing",
        "The policy was replaced or resized during the run.",
        "Nothing, if that was meant: it learns again.",
    ),
    Explained(
        "the saved recurrent drafter belongs to a policy of ... tokens and hidden size",
        "The drafters' state is of a policy of other sizes.",
        "Load a state of this policy, or none.",
    ),
    Explained(
        "the policy's logits are no scaled or capped output of its LM head: the recurrent drafter cannot learn them",
        "The policy computes its logits in a way that the drafter cannot follow.",
        "Nothing: the history index drafts alone.",
    ),
    Explained(
        "cannot see what ... makes of its LM head's output",
        "The policy's forward failed on a test of what it does behind its LM head.",
        "Nothing, while acceptance is as usual. The drafters follow its configuration instead.",
    ),
    Explained(
        "the logits of ... are not what its LM head and ... make: drafters that learn may draft badly",
        "vLLM's class of the policy changes its logits in a way that the drafters do not know.",
        "Nothing, while acceptance is as usual. Please report the policy's class.",
    ),
    Explained(
        "on a CPU the four-bit copy of the policy is dequantized",
        '`draft_model="fp4"` without a GPU drafts at the price of the policy.',
        'Leave `draft_model="fp4"` out on a CPU.',
    ),
    Explained(
        "... runs its norms, rotations and gates as they are, which takes several operations each",
        "The policy failed the engine's test with norms, rotations and gates in one pass each, and passes it without.",
        "Nothing: its steps are somewhat slower. Please report the policy's class and versions.",
    ),
    Explained(
        "cannot run as a CUDA graph",
        "The policy's forward does something that a CUDA graph cannot hold, or the GPU or torch lacks the attention that "
        "steps of fixed shapes need; the message has the reason.",
        "Nothing, or what the reason names: load a policy of float32 in bfloat16, or set the trainer's bf16=True. "
        "Its decode steps are launched kernel by kernel.",
    ),
    Explained(
        "compiling its ... kernels, once per machine",
        "The first run on a machine, or of a new version, compiles.",
        "Wait. The kernels are kept in `~/.cache/atlas_rl`, or where `ATLAS_RL_CACHE` says.",
    ),
    Explained(
        "compiled its ... kernels in ... s; they are cached for the next run",
        "Compiling is done.",
        "Nothing. If every run says so, the folder of the cache is not kept between runs: set `ATLAS_RL_CACHE`.",
    ),
    Explained(
        "skipped ... half-written or damaged lines",
        "A run that is killed, or whose disk is full, leaves half a line in `rollouts.jsonl`.",
        "Nothing: the other lines are read.",
    ),
)
"""Warnings of Python's `logging`, all below the loggers `atlas_rl`, and of `warnings`."""

UNKNOWN = "The sentence names the cause. docs/warnings.md has a list."


def advice_for(warning: str) -> str:
    """What to do about a report's warning; `UNKNOWN` for one that is in no list, such as a later version's."""
    return next((each.cure for each in REPORTED if each.fits(warning)), UNKNOWN)
