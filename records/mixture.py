"""A population as a model of text: its members mix their probabilities token by token."""
import base64
import codecs
import functools
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

import train_q0 as q
from records.counting import Counting
from records.gate import buckets_of
from records.generate import Reader, parts_of
from records.population import Population, load_population


@dataclass(frozen=True, eq=False)
class Mixture(Population):
    """Members of a run, their weights, and what turns tokens into text."""
    manifest: dict  # of the data they were trained on
    encoding: object  # tiktoken.Encoding, or None where that data came without a tokenizer
    samples: int = 1  # texts that `write` writes at once
    stream: bool = False  # it reads members from the disk for every token, which takes least memory

    def member(self, i):
        model = super().member(i)
        known = self.encoding.n_vocab if self.encoding else self.manifest.get("vocab_size")
        if model.vocab_size != known:
            raise q.UserError(f"member {i} of {self.folder} has a vocabulary of "
                              f"{model.vocab_size}, the data it came with one of {known}")
        return model

    @torch.no_grad()
    def log_probs(self, tokens):
        """log p(next token) after each of tokens [B, T], float32 [B, T, V]. Documents begin with
        encoding.eot_token. Raises UserError for T above seq_len."""
        seq_len = self.models[0].cfg.seq_len
        if tokens.size(1) > seq_len:
            raise q.UserError(f"{tokens.size(1)} tokens are more than the {seq_len} that members "
                              f"of {self.folder} see: give the last of them")
        shares = self.shares(tokens.cpu()).to(tokens.device)
        mixed = sum(share[..., None] * token_probs(model, tokens)
                    for share, model in zip(shares, self.models))
        return mixed.log_()

    def shares(self, tokens):
        """Weight of each of the M members after each of tokens [B, T], float32 [M, B, T]."""
        if self.gate is None:
            weights = torch.tensor(self.weights)
            return weights[:, None, None].expand(-1, *tokens.shape)
        weights = self.gate.weights[self.buckets(tokens.numpy())]
        return torch.from_numpy(weights).float().movedim(-1, 0)

    def buckets(self, rows):
        """Bucket of the gate after each token of rows [B, T], numpy [B, T]."""
        return np.stack([buckets_of(self.counting, row) for row in rows])

    def encode(self, text):
        """Tokens of a document that begins with `text`. Raises UserError without a tokenizer."""
        if self.encoding is None:
            raise q.UserError(f"{self.folder} has no tokenizer, because its data came without one")
        try:
            return [self.encoding.eot_token, *self.encoding.encode_ordinary(text)]
        except BaseException as e:  # of Rust: the manifest's pattern may be a hostile one
            if type(e).__name__ != "PanicException":
                raise
            raise q.UserError(f"the tokenizer of {self.folder} cannot read that text: "
                              f"{q.one_line(e)}") from None

    @functools.cached_property
    def parts(self):
        """Members as they write text."""
        return parts_of(self, self.samples, self.stream)

    def reader(self):
        return Reader(self.parts, self.shares)

    def generate(self, *args, **options):
        """Yield the pieces of the first of the texts that `write` writes."""
        for pieces in self.write(*args, **options):
            yield pieces[0]

    def write(self, prompt, tokens=128, temperature=1.0, top_p=1.0, seed=0):
        """Yield pieces of the texts that follow `prompt`, [one of each sample], up to the end of
        their documents or `tokens` of them. Temperature 0 takes the likeliest token; top_p draws
        from the fewest tokens that have this probability together. Sample i depends on `seed` and
        i alone, but for rounding: bf16's on a GPU may change it."""
        ids = self.encode(prompt)
        reader = self.reader()
        log_p = reader.read(torch.tensor([ids[-reader.seq_len:]]))
        log_p = log_p.expand(self.samples, -1)
        reader.repeat(self.samples)
        texts = [Text(self.encoding, q.seed_of("sample", seed, i)) for i in range(self.samples)]
        for left in reversed(range(tokens)):
            drawn = [text.draw(row, temperature, top_p) for text, row in zip(texts, log_p)]
            yield [text.piece(token) for text, token in zip(texts, drawn)]
            if not left or all(text.ended for text in texts):
                break
            log_p = reader.read(torch.tensor(drawn)[:, None])
        yield [text.piece(None) for text in texts]


def token_probs(member, tokens):
    """A member's p(next token) after each of tokens [B, T], float32 [B, T, V]."""
    if isinstance(member, Counting):
        return member.token_probs(tokens)
    logits = F.linear(member(tokens)[0].float(), member.head[:member.vocab_size].float())
    return torch.softmax(q.soft_capped(logits, member.cfg.softcap), dim=-1)


class Text:
    """A text that is drawn token by token."""
    def __init__(self, encoding, seed):
        self.encoding = encoding
        self.generator = torch.Generator().manual_seed(seed)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
        self.ended = False

    def draw(self, log_p, temperature, top_p):
        """A token from log_p [V]: of random times in proportion to 1 / p the first, which rounding
        does not change as it would where p is summed up."""
        p = torch.softmax(log_p / max(temperature, 1e-6), dim=-1)
        if top_p < 1:
            likeliest, order = p.sort(descending=True, stable=True)
            enough = likeliest.cumsum(0)[:-1] >= top_p  # of the likelier tokens together
            p[order[1:][enough]] = 0
        return int(p.multinomial(1, generator=self.generator))

    def piece(self, token):
        """What `token` adds; None: the text ends here. An ended one gets no longer."""
        if self.ended:
            return ""
        self.ended = token in (None, self.encoding.eot_token)
        if self.ended:
            return self.utf8.decode(b"", final=True)
        return self.utf8.decode(self.encoding.decode_single_token_bytes(token))


def load_mixture(run, k=None, device=None, samples=1, stream=False):
    """The Mixture of `run` (a name under logs/, a folder, or hf:USER/NAME): all members that the
    learned prior gives weight, or the best `k`. Raises UserError for what is missing or damaged.
    """
    population = load_population(run, k, device)
    known = {f.name: getattr(population, f.name) for f in fields(population)}
    return Mixture(**known, **load_tokenizer(population.folder / "data"), samples=samples,
                   stream=stream)


def load_tokenizer(folder):
    """{"manifest": dict, "encoding": tiktoken.Encoding or None} of a data folder. Raises UserError
    where they are missing or damaged."""
    with q.reading(f"tokenizer in {folder}"):
        manifest = q.load_json(folder / "manifest.json")
        entry = manifest["tokenizer"] or {}
        if "file" not in entry:  # prepare.py could not load GPT-2's
            return {"manifest": manifest, "encoding": None}
        path = folder / entry["file"]
        if path.name != entry["file"] or not path.is_file():  # before it is read
            raise ValueError(f"{entry['file']!r} is not the name of a regular file beside it")
        if q.sha256_of(path) != entry["sha256"]:
            raise ValueError(f"the sha256 of {path.name} is not the manifest's")
        ranks = {}
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        check_ranks(ranks, entry["eot"])
        import tiktoken
        encoding = tiktoken.Encoding(
            entry["kind"], pat_str=entry["pattern"], mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": entry["eot"]})
    return {"manifest": manifest, "encoding": encoding}


def check_ranks(ranks, eot):
    """Raise ValueError for {token: rank} at which tiktoken would panic."""
    in_order = sorted(ranks.values()) == list(range(len(ranks)))
    if not in_order or eot != len(ranks) or not all(bytes([i]) in ranks for i in range(256)):
        raise ValueError("its ranks must be distinct, hold the 256 single bytes, and end right "
                         "before that of <|endoftext|>")
