"""What a user's script does, with a policy of sixteen words: GRPO with the engine attached, then rollouts without a trainer.

Imports nothing of the tests: it runs where only the wheel is installed. Its argument is the folder that gets the run.
"""

import sys

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutEngine

WORDS = ["<pad>", "<eos>", *"abcdefghijklmn"]
WHOLE = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="a"))
WHOLE.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=WHOLE, pad_token="<pad>", eos_token="<eos>", unk_token="a")
policy = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )
)  # fmt: skip

trainer = GRPOTrainer(
    model=policy,
    reward_funcs=lambda completions, **_: [float(text.count("b")) for text in completions],
    args=GRPOConfig(
        output_dir=sys.argv[1], per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=2,
        report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, beta=0.0,
    ),
    train_dataset=Dataset.from_list([{"prompt": text} for text in ("a b c", "d e")]),
    processing_class=tokenizer,
)  # fmt: skip
AtlasRolloutEngine(output_dir=sys.argv[1]).attach(trainer)
trainer.train()

engine = AtlasRolloutEngine(model=policy, tokenizer=tokenizer, console=False)
output = engine.generate([[2, 3, 4]], num_generations=2, max_new_tokens=6, seed=0)
print("completions", output.completion_ids)

ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("atlas_rl", "atlas_kernels")]
print("loaded from", *sorted({module.__file__.rpartition("site-packages")[0] for module in ours}))
