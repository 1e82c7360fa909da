"""Tiny policies beside checkpoints that hold their layer for multi-token prediction, in the published layouts.

The layer is made by transformers' own classes and written under the published names: nothing of the reader takes part.
"""

from __future__ import annotations

import copy

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.tiny_policies import build
from tests.models import tiny_qwen2

# Names of the projection, its two norms and the last one; prefix of the block.
QWEN = ("mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm", "mtp.layers.0.")
_BESIDE = "model.layers.4."  # the tiny policies have four layers
DEEPSEEK = (f"{_BESIDE}eh_proj", f"{_BESIDE}enorm", f"{_BESIDE}hnorm", f"{_BESIDE}shared_head.norm", _BESIDE)
_MIMO = "model.mtp_layers.0."
MIMO = (
    f"{_MIMO}input_proj", f"{_MIMO}token_layernorm", f"{_MIMO}hidden_layernorm", f"{_MIMO}final_layernorm", _MIMO,
)  # fmt: skip
FAMILIES = {
    "qwen3_next": QWEN,
    "qwen3_5_text": QWEN,
    "qwen3_5, with its images' part": QWEN,
    "qwen3_5_moe_text": QWEN,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": DEEPSEEK,
    "glm4_moe_lite": DEEPSEEK,
    "mimo": MIMO,
}


class PlainLayer(nn.Module):
    """The layer as it is published, run over whole texts without a cache."""

    def __init__(self, family: str, model: nn.Module, seed: int = 5) -> None:
        super().__init__()
        config = copy.deepcopy(model.config.get_text_config())
        config._attn_implementation = "eager"
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"]
        if getattr(config, "mlp_layer_types", None):
            config.mlp_layer_types = ["sparse"]
        if hasattr(config, "first_k_dense_replace"):
            config.first_k_dense_replace = 0
        decoder, self.model = getattr(model.model, "language_model", model.model), [model]  # in a list: no submodule
        self.family, self.rotary = family, [decoder.rotary_emb]
        hidden, eps = config.hidden_size, config.rms_norm_eps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = nn.Linear(2 * hidden, hidden, bias=False)
            self.of_embedding, self.of_feature, self.last = (type(decoder.norm)(hidden, eps=eps) for _ in range(3))
            self.block = type(decoder.layers[-1])(config, 0)
            with torch.no_grad():
                for parameter in self.parameters():
                    if parameter.ndim >= 2 and min(parameter.shape) > 1:
                        parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
                    else:
                        parameter.add_(0.2 * torch.randn(parameter.shape))
        self.eval()

    def step(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Features for the next step, `[batch, n, hidden]`, from those of each position and the token after it."""
        model = self.model[0]
        embedded, feature = self.of_embedding(model.get_input_embeddings()(tokens)), self.of_feature(features)
        pair = [feature, embedded] if self.family == "mimo" else [embedded, feature]
        states = self.project(torch.cat(pair, dim=-1))
        positions = torch.arange(1, tokens.shape[1] + 1)[None].expand(len(tokens), -1)
        mask = torch.full((1, 1, tokens.shape[1], tokens.shape[1]), float("-inf")).triu(1)
        out = self.block(states, position_embeddings=self.rotary[0](states, positions), attention_mask=mask)
        return self.last(out[0] if isinstance(out, tuple) else out)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Under the published names, with experts one by one."""
        project, of_embedding, of_feature, last, block = FAMILIES[self.family]
        named = {"project": project, "of_embedding": of_embedding, "of_feature": of_feature, "last": last}
        tensors = {}
        for name, tensor in self.state_dict().items():
            part, _, rest = name.partition(".")
            if part in named:
                tensors[f"{named[part]}.{rest}"] = tensor
            elif name.endswith("experts.gate_up_proj"):
                for n, (gate, up) in enumerate(each.chunk(2) for each in tensor):
                    prefix = f"{block}mlp.experts.{n}."
                    tensors |= {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}
            elif name.endswith("experts.down_proj"):
                tensors |= {f"{block}mlp.experts.{n}.down_proj.weight": each for n, each in enumerate(tensor)}
            else:
                tensors[block + rest] = tensor
        if FAMILIES[self.family] is DEEPSEEK:
            model = self.model[0]
            tensors[f"{block}embed_tokens.weight"] = model.get_input_embeddings().weight
            tensors[f"{block}shared_head.head.weight"] = model.get_output_embeddings().weight
        return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}

    def logits(self, tokens: torch.Tensor, depth: int) -> torch.Tensor:
        """Logits `[vocab]` of the draft `depth` (from 0) for one text, int64 `[n]`, whose last `depth` tokens are drafts."""
        model, known = self.model[0], len(tokens) - depth
        features = model.model(input_ids=tokens[None, : known - 1], use_cache=False).last_hidden_state
        for drafted in range(depth + 1):
            out = self.step(tokens[None, 1 : known + drafted], features)
            features = torch.cat([features, out[:, -1:]], dim=1)
        return model.get_output_embeddings()(features[0, -1])


def tiny_policy(family: str) -> nn.Module:
    model_type, wrapped, _ = family.partition(",")
    return tiny_qwen2(layers=4) if family == "mimo" else build(model_type, seed=2, wrapper=bool(wrapped))


def loaded(folder, kind=AutoModelForCausalLM):
    """The policy of a checkpoint, without its MTP layer, as users load it."""
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def write_checkpoint(folder, model, layer, **changed):
    """The policy and its layer in one folder; `changed` tensors win, and None leaves one out."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file) | layer.tensors() | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata={"format": "pt"})
    return folder
