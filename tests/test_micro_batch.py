"""A micro-batch as the trainer runs it: recomputed, compiled, replayed as a graph. test_cost.py has
its precision, and how often each gradient is added."""
import contextlib
from collections import Counter
from unittest.mock import Mock

import pytest
import tiny
import torch
from tiny import build, random_tokens, small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_q0 as q


def storage(tensor):
    return tensor.untyped_storage()._cdata


def test_recompute_saves_memory_and_changes_nothing():
    """Dropout included. Without loops it recomputes every block, with loops the looped ones."""
    sizes = {}

    def pack(tensor):
        sizes[storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    for loops in (3, 1):
        passes = []
        saved = []
        for recompute in (False, True):
            model = build(loop_passes=loops, dropout=0.3, recompute=recompute)
            torch.manual_seed(5)
            sizes.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss, _ = q.training_loss(model, [], model.cfg, random_tokens(4, 17))
            saved.append(sum(sizes.values()))
            loss.backward()
            passes.append([loss, *[weight.grad for weight in model.parameters()]])
        assert all(torch.equal(found, wanted) for found, wanted in zip(*passes))
        assert saved[1] < 0.75 * saved[0]


@pytest.fixture
def graphs(monkeypatch):
    """Counter of (function, whether it trains) of what torch.compile traces; a backend that runs
    what was traced is quick."""
    found = Counter()
    compiler = torch.compile

    def counting(function, **options):
        def backend(graph, inputs):
            found[function.__name__, torch.is_grad_enabled()] += 1
            return graph.forward
        return compiler(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", counting)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


SHORT = dict(  # three cycles, of which the middle one has larger batches; the last two are taught
    epochs=3, trajectories=1, cycles=3, distill_after=1, distill_weight=0.45, dropout=0.1,
    layers=2, loop_first=1, loop_last=1, width=32, mlp_hidden=32, micro_batch=4, batch_tokens=128,
    edge_batch_tokens=64)


def same_weights(one, two, atol=0.0):
    for name, master in one.optimizer.masters.items():
        found = two.optimizer.masters[name]
        torch.testing.assert_close(found, master, rtol=0, atol=atol)


def test_nothing_is_compiled_after_the_warm_up(graphs, tmp_path):
    """Teacher and none, two batch sizes, a last batch of the evaluation that is not full, noise;
    and the weights are those of a run that compiles nothing."""
    cfg = small(**SHORT)
    plain = tiny.train(tmp_path / "plain", cfg)
    assert not graphs
    compiled, plan = tiny.trainer(tmp_path / "compiled", q.replace(cfg, compile=True))
    warm = dict(graphs)
    assert warm["block", True] == 3  # two layers and the multi-token block
    q.train(compiled, plan)
    assert graphs == warm
    same_weights(plain, compiled, atol=1e-4)


def test_graphs_do_not_grow_with_depth(graphs, tmp_path):
    """One for each kind of block: a short window or not, a value embedding or not."""
    for layers in (4, 8):
        graphs.clear()
        torch._dynamo.reset()
        cfg = small(layers=layers, loop_first=2, loop_last=3, dropout=0.1)
        trainer, _ = tiny.trainer(tmp_path / str(layers), cfg)
        trainer.compile_blocks()
        trainer.run_micro_batch(False)
        assert graphs == {("block", True): 4, ("blend", True): 2}


class FakeGraph(TorchDispatchMode):
    """A CUDA graph on the CPU: it records every operation and runs them again, on the same tensors.
    What Python computed is frozen, as in a real one; to read a value is an error."""
    made = []

    def __init__(self):
        super().__init__()
        self.calls = []
        self.replays = 0
        self.made.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for call in self.calls:
            function, args, kwargs = call[:3]
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(call[3]), tree_leaves(again)):
                if storage(old) != storage(new):  # neither a view nor in place
                    old.copy_(new)


@pytest.fixture
def cuda_graphs(monkeypatch):
    """The graphs that are captured."""
    monkeypatch.setattr(torch.cuda, "Stream", Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", Mock)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "made", [])
    return FakeGraph.made


def test_replayed_graphs_train_the_same(cuda_graphs, tmp_path):
    """To the last bit, with dropout. One graph with, one without a teacher, one of the update."""
    cfg = small(**SHORT, precision="bfloat16")
    plain = tiny.train(tmp_path / "plain", cfg)
    assert not cuda_graphs
    replayed = tiny.train(tmp_path / "graphs", q.replace(cfg, graphs=True))
    batches = Counter()
    for cycle in replayed.run.cycles:
        batches[cycle.distilled] += cycle.steps * cycle.rows // cfg.micro_batch
    replays = [graph.replays for graph in cuda_graphs]
    assert replays == [batches[False], batches[True], replayed.at.step]
    same_weights(plain, replayed)


def test_a_failing_capture_falls_back_loudly(cuda_graphs, tmp_path, monkeypatch, capsys):
    def fails(graph, pool):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    cfg = small(**SHORT)
    plain = tiny.train(tmp_path / "plain", cfg)
    tried = tiny.train(tmp_path / "graphs", q.replace(cfg, graphs=True))
    notice = "notice: a step is not replayed as a CUDA graph: RuntimeError: operation not permitted"
    assert capsys.readouterr().err.count(notice) == 3
    same_weights(plain, tried)
