"""What a training step costs on an H100, without one: its operations on the meta device, their
kernels, their time and memory.

A micro-batch and an update run on the meta device, where tensors have shapes and no contents. A
`Recorder` writes down every operation and the bytes alive. What torch.compile would compile is
traced and partitioned as on a GPU; `kernels` merges what a GPU's compiler fuses, and `seconds`
gives each kernel the larger of its arithmetic and its memory traffic.
"""
import contextlib
import functools
import itertools
import math
import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import train_q0 as q

BFLOAT16 = torch.bfloat16
FLOAT32 = torch.float32

# --------------------------------------------------------------------------------------------------
# Kernels that are not torch's own, as operations of the meta device, which needs their shapes alone

LIBRARY = torch.library.Library("cost", "DEF")
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, int window) -> (Tensor, Tensor)")
LIBRARY.define("attention_backward(Tensor d, Tensor q, Tensor k, Tensor v, Tensor out, "
               "Tensor sums, int window) -> (Tensor, Tensor, Tensor)")
LIBRARY.define("rms_norm(Tensor x) -> (Tensor, Tensor)")
LIBRARY.define("rms_norm_backward(Tensor d, Tensor x, Tensor scale) -> Tensor")
LIBRARY.define("rows_loss(Tensor(a!) z, Tensor? teacher_z, Tensor target, Tensor scale) -> Tensor")


def contiguous_like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("cost::attention")
def attention_shapes(q, k, v, window):
    B, T, H, _ = q.shape
    return contiguous_like(q), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.register_fake("cost::attention_backward")
def attention_backward_shapes(d, q, k, v, out, sums, window):
    return contiguous_like(q), contiguous_like(k), contiguous_like(v)


@torch.library.register_fake("cost::rms_norm")
def rms_norm_shapes(x):
    return contiguous_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.register_fake("cost::rms_norm_backward")
def rms_norm_backward_shapes(d, x, scale):
    return contiguous_like(x)


@torch.library.register_fake("cost::rows_loss")
def rows_loss_shapes(z, teacher_z, target, scale):
    return scale.new_empty(len(z), 2)


def keep_attention(ctx, inputs, output):
    *qkv, ctx.window = inputs
    ctx.save_for_backward(*qkv, *output)


def attention_backward(ctx, d, _):
    gradients = torch.ops.cost.attention_backward(d, *ctx.saved_tensors, ctx.window)
    return *gradients, None


def keep_norm(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def norm_backward(ctx, d, _):
    return torch.ops.cost.rms_norm_backward(d, *ctx.saved_tensors)


torch.library.register_autograd("cost::attention", attention_backward, setup_context=keep_attention)
torch.library.register_autograd("cost::rms_norm", norm_backward, setup_context=keep_norm)


def attention(cfg, device, window):
    """A kernel as those of train_q0.ATTENTION."""
    def attend(*qkv):
        heads_last = [x.transpose(1, 2) for x in qkv]  # as they lie in memory
        return torch.ops.cost.attention(*heads_last, window)[0].transpose(1, 2)
    return attend


def norm(x, compiled=q.norm):
    """RMSNorm: one kernel where a GPU runs it eagerly, to be fused where it is compiled."""
    return compiled(x) if torch.compiler.is_compiling() else torch.ops.cost.rms_norm(x)[0]


def rows_loss(z, teacher_z, V, target, scale, softcap, weight, temperature):
    out = torch.ops.cost.rows_loss(z, teacher_z, target, scale)
    return *out.mul_(scale[:, None]).sum(0), z


# --------------------------------------------------------------------------------------------------
# Recording: every operation, its tensors by storage, the bytes alive

@dataclass(frozen=True)
class Use:
    """A tensor that an operation reads or writes."""
    storage: int  # a serial number; views share it
    whole: int  # bytes of the storage
    offset: int  # where in it the tensor begins
    nbytes: int
    dtype: torch.dtype
    shape: tuple


@dataclass(frozen=True)
class Op:
    name: str
    inputs: tuple  # of Use
    outputs: tuple
    window: int = 0  # of attention
    tf32: bool = False  # whether products of float32 tensors may be rounded
    works: bool = True  # False for views, and for memory that nothing has filled yet
    call: int | None = None  # of the compiled graph that it is part of

    @property
    def reads(self):
        """Inputs whose contents it needs, all of them."""
        if self.name.endswith("_like") or self.name.startswith("new_"):
            return ()
        return self.inputs[1:] if self.name in OVERWRITES else self.inputs


OVERWRITES = ("copy_", "zero_", "fill_", "embedding")  # the last reads no more than it writes


class Recorder(TorchDispatchMode):
    """Writes down the operations under it. `live` is the bytes of the tensors seen that are alive
    now, `peak` the most of them at once."""
    def __init__(self):
        super().__init__()
        self.ops = []
        self.serials = {}  # address of a living storage: its serial number
        self.next = itertools.count()
        self.call = None
        self.live = 0
        self.peak = 0

    def use(self, tensor):
        storage = tensor.untyped_storage()
        address = storage._cdata
        whole = storage.nbytes()
        if address not in self.serials:
            self.serials[address] = next(self.next)
            self.live += whole
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.freed, address, whole)
        nbytes = min(whole, tensor.nbytes)  # an expanded tensor holds fewer
        return Use(self.serials[address], whole, tensor.storage_offset(), nbytes, tensor.dtype,
                   tuple(tensor.shape))

    def freed(self, address, whole):
        del self.serials[address]
        self.live -= whole

    def uses(self, tree):
        return tuple(self.use(x) for x in tree_leaves(tree) if isinstance(x, torch.Tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        mutates = func._schema.is_mutable
        inputs = self.uses((args, kwargs))
        out = func(*args, **(kwargs or {}))
        outputs = self.uses(args[0] if mutates and out is None else out)
        given = {x.storage for x in inputs}
        view = not mutates and all(x.storage in given for x in outputs)
        works = not view and not name.startswith(("empty", "new_empty"))
        window = args[-1] if name.startswith("attention") else 0
        tf32 = torch.backends.cuda.matmul.allow_tf32
        self.ops.append(Op(name, inputs, outputs, window, tf32, works, self.call))
        return out


@dataclass
class Run:
    """What one call of a graph did, for calls of like inputs to repeat."""
    given: tuple  # the inputs' Uses
    ops: list
    extra: int  # bytes alive at its peak above those before it
    outputs: list  # (Use, stride), or what is no tensor


class Graph:
    """One graph that torch.compile made. The first call for some shapes runs it; later ones repeat
    what was recorded."""
    def __init__(self, module, recorder):
        self.module = module
        self.recorder = recorder
        self.runs = {}
        self._boxed_call = True  # torch's mark: takes a list, which it empties

    def __call__(self, args):
        recorder = self.recorder
        key = tuple(x.shape if isinstance(x, torch.Tensor) else x for x in args)
        with _disable_current_modes():
            recorder.call = next(recorder.next)
            given = recorder.uses(args)
            if key in self.runs:
                outputs = self.repeat(self.runs[key], args, given)
            else:
                outputs, self.runs[key] = self.first(args, given)
            recorder.call = None
        return outputs

    def first(self, args, given):
        recorder = self.recorder
        begin = len(recorder.ops)
        live = recorder.live
        before = recorder.peak
        recorder.peak = live
        with recorder:
            outputs = torch.fx.Interpreter(self.module).boxed_run(args)
        left = recorder.uses(outputs)
        recorder.ops.append(Op("output", left, (), works=False, call=recorder.call))
        kept = [(recorder.use(x), x.stride()) if isinstance(x, torch.Tensor) else x
                for x in outputs]
        run = Run(given, recorder.ops[begin:], recorder.peak - live, kept)
        recorder.peak = max(before, recorder.peak)
        return outputs, run

    def repeat(self, run, args, given):
        recorder = self.recorder
        recorder.peak = max(recorder.peak, recorder.live + run.extra)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        args.clear()
        left = {kept[0].storage for kept in run.outputs if isinstance(kept, tuple)}
        serials = {}
        bases = {}
        for old, new in zip(run.given, given):
            serials[old.storage] = new.storage
            tensor = tensors.pop(0)
            if old.storage in left:
                bases[old.storage] = tensor.detach()
        del tensors[:], tensor  # what nothing outside holds is freed
        outputs = []
        for kept in run.outputs:
            known = isinstance(kept, tuple)
            outputs.append(self.output(*kept, serials, bases) if known else kept)
        for op in run.ops:
            inputs = self.renamed(op.inputs, serials)
            made = self.renamed(op.outputs, serials)
            recorder.ops.append(replace(op, inputs=inputs, outputs=made, call=recorder.call))
        return outputs

    def output(self, use, stride, serials, bases):
        if use.storage not in bases:
            size = use.whole // use.dtype.itemsize
            base = torch.empty(size, dtype=use.dtype, device="meta")
            bases[use.storage] = base
            serials[use.storage] = self.recorder.use(base).storage
        return bases[use.storage].as_strided(use.shape, stride, use.offset)

    def renamed(self, uses, serials):
        for x in uses:
            if x.storage not in serials:
                serials[x.storage] = next(self.recorder.next)
        return tuple(replace(x, storage=serials[x.storage]) for x in uses)


def recorded_compile(recorder):
    """A torch.compile that traces and partitions as the real one does; its graphs report to
    `recorder`."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def graph(module, inputs):
        return Graph(module, recorder)

    backend = aot_autograd(
        fw_compiler=graph, bw_compiler=graph, decompositions=select_decomp_table,
        partition_fn=min_cut_rematerialization_partition, keep_inference_input_mutations=True)
    real = torch.compile

    def compile(function, **options):
        compiled = real(function, backend=backend, dynamic=options.get("dynamic", False))

        @functools.wraps(function)
        def call(*args, **kwargs):
            with _disable_current_modes():  # under one, torch compiles nothing
                return compiled(*args, **kwargs)
        return call
    return compile


# --------------------------------------------------------------------------------------------------
# Kernels: what runs as one

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ALONE = (*PRODUCTS, "attention", "attention_backward", "rows_loss",
         "embedding_dense_backward")  # the rest of a compiled graph fuses
REDUCTIONS = ("sum", "mean", "amax", "amin", "any", "prod", "linalg_vector_norm")
ROW = 2 ** 14  # elements that a kernel can reduce and still hold when it needs the result


@dataclass
class Kernel:
    name: str
    nbytes: int  # read and written
    shape: tuple  # of its largest tensor
    dtype: torch.dtype
    flops: int = 0  # of products, attention included
    size: tuple = ()  # of a product: batch, rows, columns, inner
    tf32: bool = False  # a product of float32 tensors that may be rounded
    copied: int = 0  # bytes moved before a product that adds to a tensor
    full: bool = False  # attention without a window
    taught: bool = False  # loss with a teacher


def span(uses):
    """Bytes of the tensors `uses`, each part of a storage once."""
    parts = defaultdict(set)
    for x in uses:
        parts[x.storage, x.whole].add((x.offset, x.nbytes))
    return sum(min(whole, sum(nbytes for _, nbytes in found))
               for (_, whole), found in parts.items())


def kernel_over(name, reads, writes):
    largest = max((*reads, *writes), key=lambda x: x.nbytes)
    nbytes = span(reads) + span(writes)
    return Kernel(name, nbytes, largest.shape, largest.dtype)


def kernel_of(op):
    """The kernel of an operation that is not fused."""
    kernel = kernel_over(op.name, op.reads, op.outputs)
    first = op.inputs[0] if op.inputs else None
    if op.name in PRODUCTS:
        left, right = op.inputs[-2:]
        *batch, rows, inner = left.shape
        kernel.size = (math.prod(batch), rows, right.shape[-1], inner)
        kernel.flops = 2 * math.prod(kernel.size)
        kernel.dtype = left.dtype
        kernel.tf32 = op.tf32 and left.dtype == FLOAT32
        kernel.copied = 2 * op.outputs[0].nbytes if op.name == "baddbmm" else 0
    elif op.name.startswith("attention"):
        B, T, H, K = first.shape
        seen = op.window * (op.window + 1) // 2 + (T - op.window) * op.window
        products = 5 if op.name == "attention_backward" else 2
        kernel.flops = products * 2 * B * H * K * seen
        kernel.full = op.window >= T
        kernel.shape = first.shape
    elif op.name == "rows_loss":
        logits = op.inputs[:-2]
        kernel.nbytes = 2 * span(logits) + first.nbytes
        kernel.taught = len(logits) == 2
    return kernel


def sweeps(op):
    """Whether `op` reduces so much, or along columns, that what uses the result reads the input
    again."""
    if op.name not in REDUCTIONS:
        return False
    before = op.inputs[0].shape
    after = op.outputs[0].shape
    along_columns = before[-1:] == after[-1:]
    return along_columns or math.prod(before) > ROW * math.prod(after)


def fused(ops, later):
    """Kernels of a run of pointwise operations and reductions: one for each chain of operations
    that use each other's results. `later`: the storages that are read after the run."""
    stages = []
    ready = {}  # storage: the stage from which on it can be read
    for op in ops:
        stage = max((ready.get(x.storage, 0) for x in op.inputs), default=0)
        while len(stages) <= stage:
            stages.append([])
        stages[stage].append(op)
        for x in op.outputs:
            ready[x.storage] = stage + sweeps(op)
    for i, stage in enumerate(stages):
        after = itertools.chain(*stages[i + 1:])
        needed = later | {x.storage for op in after for x in op.inputs}
        for chain in chains(stage):
            yield from chain_kernel(chain, needed)


def chains(ops):
    """Lists of those of `ops` that use each other's results or read the same part of a storage."""
    found = []
    chain_of = {}  # what an operation reads or makes: the chain that it is in
    for op in ops:
        read = [(x.storage, x.offset, x.nbytes) for x in op.reads if math.prod(x.shape) > 1]
        keys = read + [x.storage for x in (*op.inputs, *op.outputs)]
        joined = {id(chain_of[key]): chain_of[key] for key in keys if key in chain_of}
        chain = [*itertools.chain(*joined.values()), op]
        found = [c for c in found if id(c) not in joined] + [chain]
        for key, of in chain_of.items():
            chain_of[key] = chain if id(of) in joined else of
        for key in read + [x.storage for x in op.outputs]:
            chain_of[key] = chain
    return found


def chain_kernel(chain, needed):
    """The kernel of a chain, if it leaves anything: reads from outside, writes what is `needed`."""
    made = set()
    reads = []
    for op in chain:
        reads += [x for x in op.reads if x.storage not in made]
        made |= {x.storage for x in op.outputs}
    kept = needed | {x.storage for op in chain for x in op.inputs if x.storage not in made}
    changed = {x.storage for op in chain if op.name in OVERWRITES for x in op.outputs}
    writes = [x for op in chain for x in op.outputs if x.storage in kept | changed]
    if writes:
        yield kernel_over("fused", reads, writes)


def kernels(ops):
    """The kernels that `ops` run as: one each, or fused where they are of one compiled graph."""
    for call, group in itertools.groupby(ops, key=lambda op: op.call):
        if call is None:
            yield from (kernel_of(op) for op in group if op.works)
        else:
            yield from graph_kernels(list(group))


def graph_kernels(ops):
    """The kernels of one call of a graph: products and their like, and what fuses in between."""
    last_read = {x.storage: i for i, op in enumerate(ops) for x in op.inputs}
    run = []
    for i, op in enumerate(ops):
        if op.name in (*ALONE, "output"):
            later = {storage for storage, at in last_read.items() if at >= i}
            yield from fused(run, later)
            run = []
        elif op.works:
            run.append(op)
        if op.name in ALONE:
            yield kernel_of(op)


# --------------------------------------------------------------------------------------------------
# Time on one H100 80GB HBM3. What is measured, and how well the rest is predicted from it, is told
# in records/tuning/2026-11-27_cost_model.md.

TF32 = "tf32"
PEAK = {BFLOAT16: 989e12, TF32: 494.5e12, FLOAT32: 67e12}  # FLOP/s of dense products
SHARE = {BFLOAT16: 0.86, TF32: 0.77, FLOAT32: 0.77}  # of it, that a tile's inner loop reaches
BATCHED_SHARE = 0.79  # the same of bf16 products in batches
ATTENTION_SHARE = {  # of the bf16 peak, by whether all is seen (cuDNN; else flex), channels a head
    (True, 128): 0.40, (False, 128): 0.26, (True, 64): 0.21, (False, 64): 0.10}
TILE = (128, 256)  # rows and columns of a product that one multiprocessor makes at a time
PROLOGUE = 256  # steps of the inner loop that a tile's beginning and end cost
MULTIPROCESSORS = 132
BANDWIDTH = 0.9 * 3.0e12  # bytes a second: 0.9 of what a copy reaches
LOSS_BANDWIDTH = {False: 2.53e12, True: 2.0e12}  # of rows_loss, by whether there is a teacher
GAP = 3e-6  # seconds of the GPU between two kernels
HOST = 70e-6  # of the host, to launch a kernel that no graph replays


def product_seconds(kernel):
    """Waves of tiles over the multiprocessors. Where tiles are few, cuBLAS cuts the inner dimension
    of bf16 products; it did not cut that of TF32 ones."""
    dtype = TF32 if kernel.tf32 else kernel.dtype
    batch, rows, columns, inner = kernel.size
    height, width = (min(most, 64 * math.ceil(n / 64)) for most, n in zip(TILE, (rows, columns)))
    tiles = batch * math.ceil(rows / height) * math.ceil(columns / width)
    share = SHARE[dtype]
    parts = 1
    if dtype == BFLOAT16:
        parts = max(1, min(MULTIPROCESSORS // tiles, inner // PROLOGUE))
        share = BATCHED_SHARE if batch > 1 else share
    waves = math.ceil(tiles * parts / MULTIPROCESSORS)
    flops = 2 * height * width * (inner / parts + PROLOGUE)
    return waves * flops / (share * PEAK[dtype] / MULTIPROCESSORS)


def attention_share(kernel):
    channels = 64 if kernel.shape[3] < 128 else 128
    return ATTENTION_SHARE[kernel.full, channels]


def seconds(kernel):
    """Of one kernel, without its launch."""
    memory = kernel.nbytes / BANDWIDTH
    if kernel.name in PRODUCTS:
        return max(memory, product_seconds(kernel)) + kernel.copied / BANDWIDTH
    if kernel.name.startswith("attention"):
        return max(memory, kernel.flops / (attention_share(kernel) * PEAK[BFLOAT16]))
    if kernel.name == "rows_loss":
        return kernel.nbytes / LOSS_BANDWIDTH[kernel.taught]
    return memory


# --------------------------------------------------------------------------------------------------
# A step

@dataclass
class Part:
    """A micro-batch or an update: what it did, the bytes alive before it and at its peak."""
    ops: list
    held: int
    peak: int
    masters: set  # storages of the float32 weights that have working copies

    @functools.cached_property
    def kernels(self):
        return list(kernels(self.ops))

    def seconds(self, graphed=False):
        """Modelled time; where no CUDA graph replays it, small kernels wait for the host."""
        device = sum(seconds(k) + GAP for k in self.kernels)
        return device if graphed else max(device, HOST * len(self.kernels))

    @property
    def flops(self):
        return sum(k.flops for k in self.kernels)

    def heaviest(self):
        """[(what, times, seconds), ...] of like kernels together, the slowest first."""
        times = Counter()
        total = Counter()
        for kernel in self.kernels:
            what = described(kernel)
            times[what] += 1
            total[what] += seconds(kernel)
        return [(what, times[what], s) for what, s in total.most_common()]


def described(kernel):
    dtype = str(kernel.dtype).removeprefix("torch.")
    if kernel.name in PRODUCTS:
        batch, rows, columns, inner = kernel.size
        by = f"{batch} x " if batch > 1 else ""
        return f"{kernel.name} {dtype} {by}[{rows}, {inner}] [{inner}, {columns}]"
    return f"{kernel.name} {dtype} {list(kernel.shape)}, {kernel.nbytes / 1e6:.1f} MB"


@contextlib.contextmanager
def on_meta(recorder):
    """Context in which train_q0 runs on the meta device as it would on a GPU."""
    kernels = dict(
        use_triton=lambda device_type: True, norm=norm, rows_loss_in_triton=rows_loss)
    compile = recorded_compile(recorder)
    with (mock.patch.multiple(q, **kernels), mock.patch.object(torch, "compile", compile),
          torch._dynamo.config.patch(recompile_limit=64), recorder):
        yield


def record(recorder, function, weights=()):
    """The Part that a call of `function` is; `weights` are the float32 ones."""
    begin = len(recorder.ops)
    held = recorder.live
    recorder.peak = held
    masters = {recorder.use(tensor).storage for tensor in weights}
    function()
    return Part(recorder.ops[begin:], held, recorder.peak, masters)


def trainer_on_meta(cfg, vocab_size):
    """A Trainer that has what a micro-batch and an update need, and nothing else."""
    trainer = object.__new__(q.Trainer)
    trainer.cfg = cfg
    trainer.world = q.World(device=torch.device("meta"))
    with torch.device("meta"):
        trainer.student = q.GPT(cfg, vocab_size).train()
        trainer.newest = q.empty_member(cfg, vocab_size)
    trainer.teacher = [(1.0, trainer.newest)]
    for model in (trainer.student, trainer.newest):
        model.attend = q.attention_by_window(attention, cfg, "meta")
    trainer.optimizer = q.Optimizer(trainer.student, cfg, trainer.world)
    trainer.set_up_micro_batch()
    return trainer


@dataclass
class Step:
    """The parts of training, in the midst of it: a step is many micro-batches and one update."""
    micro_batch: Part
    taught: Part | None  # a micro-batch with a teacher, where the run has one
    update: Part


def step(cfg, vocab_size, compile=True, fuse_update=True):
    """The Step of `cfg`. Tracing what torch.compile would compile takes most of the time;
    `fuse_update` False leaves the update's out, which then seems about twice as slow as it is."""
    torch._dynamo.reset()
    recorder = Recorder()
    with on_meta(recorder):
        trainer = trainer_on_meta(cfg, vocab_size)
        if compile:
            trainer.compile_blocks()
        if compile and fuse_update:
            trainer.optimizer.compile()
        copied = [bank.master for bank in trainer.optimizer.banks.values() if bank.copied]

        def recorded(function):
            function()  # the first call compiles
            return record(recorder, function, copied)

        micro_batch, taught = (functools.partial(trainer.run_micro_batch, t) for t in (False, True))
        return Step(recorded(micro_batch), recorded(taught) if cfg.distill_weight else None,
                    recorded(trainer.optimizer.run_update))


# --------------------------------------------------------------------------------------------------
# What must not come back

def float32_products(ops):
    """Products of float32 inputs, in TF32 or not."""
    return [op for op in ops if op.name in PRODUCTS and op.inputs[-1].dtype == FLOAT32]


def weight_casts(ops, masters):
    """Elements cast from float32 to bfloat16 of the weights in the storages `masters` (those of
    Part), or of what was made of weights alone, such as mixed heads."""
    weights = set(masters)
    count = 0
    for op in ops:
        if not op.reads or any(x.storage not in weights for x in op.reads):
            continue
        weights |= {x.storage for x in op.outputs}
        cast = op.reads[0].dtype == FLOAT32 and op.outputs[0].dtype == BFLOAT16
        count += math.prod(op.outputs[0].shape) if cast else 0
    return count


def gradient_additions(ops, shapes):
    """{shape: how many float32 additions} of tensors of the `shapes` of parameters."""
    found = Counter()
    for op in ops:
        if op.name in ("add", "add_", "_foreach_add_", "_foreach_add"):
            found.update(x.shape for x in op.outputs if x.dtype == FLOAT32)
    return Counter({shape: found[shape] for shape in map(tuple, shapes) if found[shape]})
