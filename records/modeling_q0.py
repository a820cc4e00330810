"""A q0 population as one Hugging Face model: its logits are the mixture's log-probabilities.

`train_q0.py export` writes this file with the definitions of train_q0.py in place of the import of
them, so that it stands alone. For inference: nothing here has gradients.
"""
from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

from train_q0 import GPT, Config, mixed_probs


class Member(GPT):
    """A member. It computes in the dtype that its weights have."""
    def forward(self, tokens, places):
        """Raw logits [B, P, V] at places [B, P] of tokens [B, T]."""
        self.dtype = self.embed.dtype
        hidden, _ = super().forward(tokens)
        hidden = hidden.take_along_dim(places[..., None], dim=1)
        return F.linear(hidden.float(), self.head[:self.vocab_size].float())


class Q0Config(PretrainedConfig):
    """members: the settings of each; weights: theirs in the mixture; vocab_size."""
    model_type = "q0"


class Q0ForCausalLM(PreTrainedModel, GenerationMixin):
    """Members mix their probabilities, never their logits."""
    config_class = Q0Config
    _no_split_modules = ["Member"]

    def __init__(self, config):
        super().__init__(config)
        self.members = nn.ModuleList(
            Member(Config(**settings), config.vocab_size) for settings in config.members)
        self.post_init()

    def _init_weights(self, module):
        """Make the rotary tables, which are in no file; transformers has lost those of `Member`."""
        if isinstance(module, Member):
            made = GPT(replace(module.cfg, layers=1, precision="float32"), 1)  # a small one
            module.cos = made.cos.to(module.cos.device, module.embed.dtype)
            module.sin = made.sin.to(module.sin.device, module.embed.dtype)

    @can_return_tuple
    @torch.no_grad()
    def forward(self, input_ids, attention_mask=None, labels=None, logits_to_keep=0):
        """log p(next token) after each of input_ids [B, T], float32 [B, T, V]; of more than the
        members' seq_len the last are seen, and have logits. attention_mask [B, T] may hide padding
        at the left or right of rows, else ValueError. The loss is the mean over `labels`, shifted
        here; -100: ignored. logits_to_keep: the last of the logits, 0: all."""
        first = self.members[0].cfg
        input_ids = input_ids[:, -first.seq_len:]
        tokens, places = without_padding(input_ids, attention_mask)
        places = places[:, -logits_to_keep:]
        logits = (member(tokens, places).to(tokens.device) for member in self.members)
        log_p = mixed_probs(logits, self.config.weights, first.softcap).log_()
        loss = None
        if labels is not None:
            targets = labels[:, -first.seq_len:][:, 1:]
            loss = F.cross_entropy(log_p[:, :-1].flatten(0, 1), targets.flatten())
        return CausalLMOutput(loss=loss, logits=log_p)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # of keys and values: `generate` makes none, whatever its use_cache

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """What `forward` takes: all tokens each time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}


def without_padding(tokens, mask):
    """(tokens [B, T] with each row's padding at its end, where no token sees it; where in them each
    of the given tokens is now [B, T])."""
    B, T = tokens.shape
    mask = torch.ones_like(tokens) if mask is None else mask[:, -T:].long()
    start = mask.argmax(dim=1, keepdim=True)
    along = torch.arange(T, device=tokens.device)
    moved = (along + start) % T
    if mask.shape != tokens.shape or (mask.gather(1, moved).diff(dim=1) > 0).any():
        raise ValueError("attention_mask must be [B, T] and hide nothing but padding at the left "
                         "or right of rows")
    return tokens.gather(1, moved), (along - start) % T
