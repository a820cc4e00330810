"""Members of a mixture as they read a text token by token: those of one shape run as one model, a
batch holds the rows of all, and each pass of a layer keeps its keys and values.

Shapes: K members, B texts, R = K * B rows of a batch (member by member), T new tokens, S slots.
"""
import contextlib
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train_q0 as q
from records.counting import Counting
from records.population import fetch

READ_ROWS = 8192  # tokens of all rows that go through a stack at once


class Stacked:
    """A bank of K members where the model expects one's: a product takes the rows of each member
    times its own matrix."""
    def __init__(self, matrices, blocks=1):
        self.matrices = matrices  # [..., K, in, out]: products of few rows read them in this order
        self.blocks = blocks

    def __len__(self):
        return self.blocks

    def unbind(self):
        return [Stacked(matrices) for matrices in self.matrices]

    def flatten(self, first, last):
        return self  # its outputs lie side by side already

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """torch asks here how to call `function` on arguments of this class."""
        if function is not F.linear:
            return NotImplemented
        x, weight = args
        K, rows, columns = weight.matrices.shape
        y = torch.bmm(x.reshape(K, -1, rows), weight.matrices)
        return y.view(*x.shape[:-1], columns)


# What is kept of a text -------------------------------------------------------------------------

class Shift:
    """train_q0.shifted, of a sequence that comes in parts."""
    def __init__(self):
        self.last = None

    def __call__(self, x):
        last = torch.zeros_like(x[:, :1]) if self.last is None else self.last
        self.last = x[:, -1:].clone()  # not a view, which would keep all of x
        return torch.cat((last, x[:, :-1]), dim=1)


class Pass:
    """One pass of a layer: keys and values [R, H, S, head_dim] of the tokens read."""
    def __init__(self, keys, values):
        self.keys = keys
        self.values = values
        self.shift = Shift()

    def attend(self, start, window):
        """Attention of new tokens, the first of them in slot `start`, as one of
        train_q0.ATTENTION."""
        def attend(q_, k, v):
            T = k.size(2)
            end = start + T
            first = max(0, start + 1 - window)
            self.keys[:, :, start:end] = k
            self.values[:, :, start:end] = v
            mask = None
            if T > 1:
                mask = q.visible(end, window, k.device)[start:, first:]
            return F.scaled_dot_product_attention(
                q_, self.keys[:, :, first:end], self.values[:, :, first:end], attn_mask=mask)
        return attend


class Cache:
    """All that a stack keeps of B texts of the same length."""
    def __init__(self, cfg, rows, device):
        shape = rows, cfg.width // cfg.head_dim, cfg.seq_len, cfg.head_dim
        kind = dict(dtype=getattr(torch, cfg.precision), device=device)
        self.passes = []
        for _ in q.layer_order(cfg):
            self.passes.append(Pass(torch.empty(shape, **kind), torch.empty(shape, **kind)))
        self.forget()

    def forget(self):
        """The next token is the first one."""
        self.length = 0
        self.shift = Shift()  # of embeddings
        for one in self.passes:
            one.shift = Shift()

    def change(self, function):
        """Put function(tensor) in the place of each tensor [R, ...]."""
        for one in self.passes:
            one.keys = function(one.keys)
            one.values = function(one.values)
        for shift in (self.shift, *(one.shift for one in self.passes)):
            if shift.last is not None:
                shift.last = function(shift.last)


def cache_bytes(cfg, rows):
    """Bytes of a Cache, but for the last token's values."""
    width = 2 if cfg.precision == "bfloat16" else 4
    return len(q.layer_order(cfg)) * 2 * rows * cfg.width * cfg.seq_len * width


# Members as one model ---------------------------------------------------------------------------

class Stack(q.GPT):
    """K members of one configuration and vocabulary. On a CPU they are float32, which takes one
    conversion instead of one a token, and is what most CPUs are fastest at."""
    def __init__(self, cfg, vocab_size, K, device):
        precision = cfg.precision if device.type == "cuda" else "float32"
        # heads are mixed once, in `fill`; the multi-token block does not run
        super().__init__(
            replace(cfg, head_mixing=False, mtp_weight=0.0, precision=precision), vocab_size)
        self.cos = self.cos.to(device)
        self.sin = self.sin.to(device)
        self.scales = []
        self.offsets = torch.arange(K, device=device) * self.embed.size(0)
        for name, parameter in list(self.named_parameters()):
            delattr(self, name)
            setattr(self, name, self.bank(name, parameter, K, device))

    def bank(self, name, parameter, K, device):
        """Room for the K tensors of a bank, as the model's code reads them."""
        row = self.table[name]
        kind = dict(dtype=self.dtype, device=device)
        n = len(row.blocks)
        if name == "embed":
            return torch.empty(K * len(parameter), self.cfg.width, **kind)
        if name == "head":  # logits are float32
            return torch.empty(K, self.cfg.width, self.vocab_size, device=device)
        if name == "value":  # all layers' in one product
            return Stacked(torch.empty(K, self.cfg.width, n * self.cfg.width, **kind), n)
        if row.blocks:
            columns = math.prod(row.shape[:-1])
            return Stacked(torch.empty(n, K, row.shape[-1], columns, **kind), n)
        self.scales.append(name)
        return torch.empty(K, *parameter.shape, **kind)

    def fill(self, k, weights):
        """Put `weights` {bank: tensor} in the place of member k."""
        for name, row in self.table.items():
            own = getattr(self, name)
            bank = weights[name]
            if row.blocks:
                n = len(row.blocks)
                bank = bank[:n].to(own.matrices)
            if name == "qkv" and "mixing" in weights:
                bank = q.mix_heads(bank, weights["mixing"][:n].to(bank))
            if name == "embed":
                own.view(-1, *bank.shape)[k] = bank
            elif name == "head":
                own[k] = bank[:self.vocab_size].mT
            elif name == "value":
                own.matrices[k] = bank.flatten(0, 1).mT
            elif row.blocks:
                own.matrices[:, k] = bank.flatten(1, -2).mT
            else:
                own[k] = bank
        return self

    def forward(self, tokens, cache):
        """Logits [K, B, V] after the last of tokens [B, T], which follow those that `cache` holds,
        and which it holds then."""
        B, T = tokens.shape
        K = len(self.offsets)
        scales = {name: getattr(self, name) for name in self.scales}
        for name, scale in scales.items():  # one for each row
            scale = scale.repeat_interleave(B, 0)
            setattr(self, name, scale[:, None] if name == "smear" else scale.mT[..., None, None])
        self.cache = cache
        self.left = iter(cache.passes)
        self.shifted = cache.shift
        x, _ = super().forward((tokens + self.offsets[:, None, None]).flatten(0, 1))
        for name, scale in scales.items():
            setattr(self, name, scale)
        cache.length += T
        return torch.bmm(x[:, -1].view(K, B, -1).float(), self.head)

    def run_block(self, i, x, w, T, window):
        one = next(self.left)
        start = self.cache.length
        now = slice(start, start + T)
        attend = one.attend(start, window)
        return self.block(
            x, w, self.cos[now], self.sin[now], attend, self.cfg, False, one.shift)


@dataclass(frozen=True, eq=False)
class Part:
    """Members that read together: a full stack, or one whose weights come from `file` each time."""
    stack: Stack
    columns: list  # their places in the mixture
    device: torch.device
    file: Path | None = None

    @property
    def cfg(self):
        return self.stack.cfg

    def cache(self):
        """A Cache of one text. That of a streamed part waits in the host's memory."""
        return Cache(self.cfg, len(self.columns), "cpu" if self.file else self.device)

    def probs(self, tokens, cache, shares):
        """sum_k share_k p_k [B, V] of what follows tokens [B, T], read into `cache`; shares [K, B]
        are of all members of the mixture."""
        if self.file:
            with q.reading(f"member {self.file.parent}"):
                self.stack.fill(0, q.load_tensor_file(self.file))
            cache.change(self.to_device)
        rows = len(tokens) * len(self.columns)
        for some in tokens.to(self.device).split(max(1, READ_ROWS // rows), dim=1):
            logits = self.stack(some, cache)
        if self.file:
            cache.change(torch.Tensor.cpu)
        p = q.soft_capped(logits, self.stack.cfg.softcap).softmax(-1)
        return torch.einsum("kb,kbv->bv", self.to_device(shares[self.columns]), p)

    def to_device(self, tensor):
        return tensor.to(self.device)


class Context:
    """The tokens of B texts, for a member that reads them anew each time."""
    def __init__(self):
        self.tokens = torch.empty(1, 0, dtype=torch.long)

    def forget(self):
        self.tokens = self.tokens[:, :0]

    def change(self, function):
        self.tokens = function(self.tokens)


@dataclass(frozen=True, eq=False)
class CountingPart:
    """A member that counts, as a Part."""
    member: Counting
    column: int

    @property
    def cfg(self):
        return self.member.cfg

    def cache(self):
        return Context()

    def probs(self, tokens, cache, shares):
        cache.tokens = torch.cat((cache.tokens, tokens), dim=1)
        found = [self.member.next_probs(row) for row in cache.tokens.numpy()]
        return shares[self.column, :, None] * torch.from_numpy(np.stack(found))


class Reader:
    """Texts of the same length as a mixture reads them. Beyond the context the older half of it is
    forgotten, and the rest is read again: each token sees half a context at least."""
    def __init__(self, parts, shares):
        self.parts = parts
        self.shares = shares  # Mixture.shares
        self.seq_len = parts[0].cfg.seq_len
        self.caches = [part.cache() for part in parts]
        self.tokens = torch.empty(1, 0, dtype=torch.long)  # of the context so far

    @torch.no_grad()
    def read(self, tokens):
        """log p(next token) [B, V] after tokens [B, T <= seq_len], which follow those read before;
        on the CPU. B is 1 before `repeat`."""
        self.tokens = torch.cat((self.tokens, tokens), dim=1)
        if self.tokens.size(1) > self.seq_len:
            self.tokens = tokens = self.tokens[:, self.seq_len // 2:]
            for cache in self.caches:
                cache.forget()
        shares = self.shares(self.tokens)[..., -1]
        found = [part.probs(tokens, cache, shares)
                 for part, cache in zip(self.parts, self.caches)]
        return sum(p.cpu() for p in found).log_()

    def repeat(self, n):
        """Go on with n copies of the text."""
        self.tokens = self.tokens.repeat(n, 1)
        for cache in self.caches:
            cache.change(partial(torch.repeat_interleave, repeats=n, dim=0))


# Where members are ------------------------------------------------------------------------------

# settings that members of one stack share
SHAPE = ("seq_len layers width head_dim mlp_hidden softcap windows short_window unet x0_mix "
         "value_embeds attn_gates head_mixing smear induction loop_first loop_last loop_passes "
         "precision").split()


@dataclass(frozen=True)
class MemberFile:
    """A member that is to be placed."""
    number: int
    column: int  # its place in the mixture
    cfg: q.Config
    vocab_size: int
    file: Path
    size: int  # bytes of the file

    @property
    def shape(self):
        return (self.vocab_size, *(getattr(self.cfg, name) for name in SHAPE))

    def stack(self, K, device):
        return Stack(self.cfg, self.vocab_size, K, device)

    def bytes_on(self, device, texts):
        """Of weights, which a file has in bf16, and of a cache."""
        wide = device.type == "cpu" or self.cfg.precision == "float32"
        cfg = replace(self.cfg, precision="float32" if wide else "bfloat16")
        return (2 if wide else 1) * self.size + cache_bytes(cfg, texts)


def member_files(mixture):
    """The MemberFile of each member that was trained. Raises UserError where they do not mix or are
    damaged."""
    found = []
    for column, i in enumerate(mixture.members):
        folder = fetch(mixture.folder, i)
        with q.reading(f"member {folder}"):
            about = q.load_json(folder / "config.json")
            q.check_format(about)
            if "kind" in about:
                continue
            file = folder / "model.safetensors"
            cfg = q.Config(**about["config"])
            size = file.stat().st_size
            found.append(MemberFile(i, column, cfg, int(about["vocab_size"]), file, size))
    mixture.check_mix(found)
    return found


def rooms(device):
    """[(device, bytes that are free on it), ...]: of a GPU without a number, all."""
    if device.type == "cuda":
        numbers = [device.index]
        if device.index is None:
            numbers = range(torch.cuda.device_count())
        found = [torch.device("cuda", n) for n in numbers]
        return [(one, torch.cuda.mem_get_info(one)[0]) for one in found]
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return [(device, 1024 * int(line.split()[1]))]
    return [(device, math.inf)]


def place(files, free, texts):
    """{(device, shape): [MemberFile, ...]} that fills one device after the other; None where they
    do not fit. `free` is as of rooms()."""
    found = {}
    free = iter(free)
    device, left = next(free)
    for one in files:
        while one.bytes_on(device, texts) > 0.9 * left:  # the rest is for what is computed
            device, left = next(free, (None, 0))
            if device is None:
                return None
        left -= one.bytes_on(device, texts)
        found.setdefault((device, one.shape), []).append(one)
    return found


def parts_of(mixture, texts, stream=False):
    """The Parts of a mixture that is to read so many texts: stacks, or members that are read from
    the disk one at a time, where they do not fit or `stream` is set. Raises UserError."""
    files = member_files(mixture)
    trained = [one.column for one in files]
    parts = [CountingPart(mixture.member(i), column)
             for column, i in enumerate(mixture.members) if column not in trained]
    free = rooms(mixture.device)
    groups = None if stream else place(files, free, texts)
    if groups is None:
        need = sum(one.bytes_on(mixture.device, texts) for one in files) / 1e9
        room = sum(left for _, left in free) / 1e9
        print(f"notice: {len(files)} members take {need:.3g} GB, {room:.3g} GB are free: each is "
              "read from the disk for every token", file=sys.stderr)
        return parts + list(streamed(mixture, files, free[0][0]))
    for (device, _), group in groups.items():
        stack = group[0].stack(len(group), device)
        for k, one in enumerate(group):
            stack.fill(k, dict(mixture.member(one.number).named_parameters()))
        parts.append(Part(stack, [one.column for one in group], device))
    return parts


def streamed(mixture, files, device):
    """Their Parts; those of one shape use the same stack in turn."""
    stacks = {}
    for one in files:
        mixture.member(one.number)  # checked once
        if one.shape not in stacks:
            stacks[one.shape] = one.stack(1, device)
        yield Part(stacks[one.shape], [one.column], device, one.file)
