"""A member that looks up what came after similar contexts of the training text.

How similar is the cosine of hidden states of a trained member (Khandelwal et al. 2020, with all
contexts as neighbours and no search). It costs no epoch, but a matrix product with all keys for
every token. `train_q0.py count RUN --neighbours` adds it.
"""
import numpy as np
import torch
import torch.nn.functional as F

import train_q0 as q
from records.counting import Counting

SHARPNESS = 17.0  # a context weighs exp(SHARPNESS cosine)
UNIFORM = 0.001  # share of the uniform distribution
CHUNK = 4096  # keys at a time


class Neighbours(Counting):
    """p(next token) = weight of the contexts that it came after, as a share of that of all."""
    kind = "neighbours"

    def __init__(self, model, keys, after, eot):
        """keys float16 [N, D]: unit hidden states of `model` on the training text; after uint16
        [N]: the tokens that followed. Raises ValueError for others."""
        super().__init__(model.vocab_size, eot, model.cfg)
        self.model = model
        self.tensors = {**dict(model.named_parameters()), "keys": keys, "after": after}
        shape = (len(after), model.cfg.width)
        if after.dtype != torch.uint16 or keys.shape != shape or not keys.isfinite().all():
            raise ValueError("its keys are not a hidden state for each token")
        self.keys = keys.float()
        self.after = after.long()
        if not self.after.max() < model.vocab_size:
            raise ValueError("it has tokens beyond the vocabulary")

    def probs(self, tokens):
        """p(next token) after each of tokens [T]: float32 [T, V]."""
        return self.probs_after(hidden_states(self.model, tokens))

    def next_probs(self, tokens):
        return self.probs_after(hidden_states(self.model, tokens)[-1:])[-1]

    def probs_after(self, hidden):
        """p(next token) after hidden states [T, D]: float32 [T, V]."""
        queries = SHARPNESS * hidden.T
        P = torch.zeros(self.vocab_size, len(hidden))
        chunks = zip(self.keys.split(CHUNK), self.after.split(CHUNK))
        for keys, after in chunks:
            weights = (keys @ queries).exp_()
            P.index_add_(0, after, weights)
        P *= (1 - UNIFORM) / P.sum(dim=0)
        P += UNIFORM / self.vocab_size
        return P.T.numpy()


def hidden_states(model, tokens):
    """Unit hidden states of tokens [T]: float32 [T, D]."""
    hidden, _ = model(torch.from_numpy(tokens)[None])
    return F.normalize(hidden[0].float(), dim=-1)


def neighbours_of(model, text, eot):
    """The member of a trained one and a training text, uint16 [n]."""
    rows = q.cut(text, model.cfg.seq_len)
    keys = [hidden_states(model, row[:-1].astype(np.int64)) for row in rows]
    keys = torch.cat(keys).half()
    after = torch.from_numpy(rows[:, 1:].flatten())
    return Neighbours(model, keys, after, eot)
