"""The Triton kernels against float64, and compiled for an H100.

The tests of TestOnDevice run where the kernels do: here on a GPU if there is one; and always in a process of their own
under Triton's interpreter, through the very dispatch that a GPU takes."""
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script this file has no conftest
triton = pytest.importorskip("triton", reason="triton is not installed")

import train_q0 as q  # noqa: E402: after the check for triton

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET, which must be set before triton is imported
DEVICE = "cpu" if INTERPRETED else "cuda"
CAP = 15.0
ROUNDING = {torch.bfloat16: 2 ** -8, torch.float32: 2 ** -24}  # to nearest: half of the last of 8, 24 bits
bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
outside = pytest.mark.skipif(INTERPRETED, reason="not a test of the interpreter")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0, dtype=torch.float32, size=1.0):
    return (size * torch.randn(*shape, generator=seeded(seed))).to(DEVICE, dtype)


def exact(z, teacher, target, weight, T):
    """(loss, cross-entropy, gradient by z) of raw logits by plain_loss in float64: with the identity as head, hidden
    states are logits."""
    z, eye = z.double().requires_grad_(), torch.eye(z.size(1), dtype=torch.float64, device=z.device)
    loss, ce = q.plain_loss(z, eye, target, CAP, [] if teacher is None else [(1.0, teacher.double(), eye)], weight, T)
    loss.backward()
    return loss.item(), ce.item(), z.grad


def checked_rows_loss(z, teacher, target, weight, T, padding=0):
    kept = (target >= 0).float()
    wide = [None if x is None else torch.nn.functional.pad(x, (0, padding)).contiguous() for x in (z, teacher)]
    room = torch.cat((wide[0].flatten(), torch.full((5000,), 7.0).to(wide[0])))  # a block's length behind the logits
    wide[0] = room[:wide[0].numel()].view_as(wide[0])
    loss, ce, d = q.rows_loss(*wide, z.size(1), target, kept / kept.sum(), CAP, weight, T)
    loss_, ce_, d_ = exact(z, teacher, target, weight, T)
    # float32: logits of up to 15 err by 15 * 2^-23 = 2e-6, a few times over, 1 / T as much in what is divided by T
    assert abs(ce.item() - ce_) < 1e-5 and abs(loss.item() - loss_) < 2e-5
    assert d.data_ptr() == wide[0].data_ptr() and d.dtype == z.dtype  # in place
    # that error in the exponents
    bound = 1e-5 / kept.sum() + 1.01 * ROUNDING[z.dtype] * d_.abs()
    assert ((d[:, :z.size(1)].double() - d_).abs() <= bound).all()
    assert not d[:, z.size(1):].any() and not d[target < 0].any() and (room[d.numel():] == 7).all()


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(),
                    reason="no GPU here; test_under_the_interpreter runs these tests")
class TestOnDevice:
    @pytest.fixture(autouse=True)
    def rounding_to_nearest(self, monkeypatch):
        """The interpreter cuts bf16 off where a GPU rounds: twice the error, and a bias."""
        if INTERPRETED:
            from triton.runtime import interpreter
            convert = interpreter._convert_float

            def nearest(x, source, target, mode):
                if (source, target) != (triton.language.float32, triton.language.bfloat16):
                    return convert(x, source, target, mode)
                bits = np.ascontiguousarray(x).view(np.float32)
                return torch.from_numpy(bits).bfloat16().view(torch.uint16).numpy()

            monkeypatch.setattr(interpreter, "_convert_float", nearest)

    # columns: less than a block and not a multiple of the vector; several blocks, the last one ragged
    @pytest.mark.parametrize("rows, V, padding",
                             [(1, 100, 28), (7, 1000, 0), (7, 1000, 24), (7, 2501, 59), (1, 4096, 0)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_loss(self, rows, V, padding, dtype):
        z, teacher = (drawn(rows, V, seed=s, dtype=dtype, size=4) for s in (1, 2))
        target = torch.randint(V, (rows,), generator=seeded(3)).to(DEVICE)
        target[0] = V - 1  # in the last block
        for T in (1.0, 1.2, 0.7):
            for weight in (0.0, 0.45, 1.0):
                checked_rows_loss(z, teacher, target, weight, T, padding)
        checked_rows_loss(z, None, target, 0.45, 1.2, padding)  # no teacher: cross-entropy, whatever the weight

    def test_maxima_that_rise_and_fall_from_block_to_block(self):
        slope, target = torch.linspace(-20, 20, 5000), torch.tensor([0, 2500, 4999], device=DEVICE)
        slope, scale = slope.to(DEVICE).expand(3, -1).contiguous(), torch.full((3,), 1 / 3, device=DEVICE)
        for z, teacher in ((slope, -slope), (-slope, slope), (slope, slope)):
            for T in (1.0, 0.1):  # at T = 0.1 sums of exp(x / T) overflow unless they are relative to a maximum
                loss, ce, d = q.rows_loss(z.clone(), teacher.clone(), z.size(1), target, scale, CAP, 0.45, T)
                loss_, ce_, d_ = exact(z, teacher, target, 0.45, T)
                assert (loss.item(), ce.item()) == pytest.approx((loss_, ce_), abs=1e-5)  # as above; T^2 tames 1 / T
                assert (d.double() - d_).abs().max() < 1e-5 / 3  # of exponents 1 / T as much, times T

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_ignored_targets_and_saturated_logits(self, dtype):
        z, teacher = (drawn(7, 300, seed=s, dtype=dtype, size=40) for s in (1, 2))  # most are beyond the soft-cap
        z[:, ::5] /= 20
        z[1, 0], z[1, 1] = 3000, -3000
        for target in ([5, -1, 0, 299, -1, 7, 7], [-1] * 6 + [0]):
            target = torch.tensor(target, device=DEVICE)
            checked_rows_loss(z, teacher, target, 0.45, 1.2)
            checked_rows_loss(z, None, target, 0.0, 1.0)

    @pytest.mark.parametrize("teachers", [0, 1, 2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_chunked_loss(self, dtype, teachers, monkeypatch):
        """From hidden states, in chunks, an odd vocabulary. In bf16 logits, their gradient and its products are each
        rounded, by up to 2^-8: measured 0.6% of the largest gradient; in float32 1e-6."""
        N, D, V, weight, T = 11, 40, 1001, 0.45 * bool(teachers), 1.2
        for name in ("CHUNK_LOGITS", "GPU_CHUNK_LOGITS"):
            monkeypatch.setattr(q, name, 4 * V)
        hidden, head = drawn(N, D, seed=1, dtype=dtype).requires_grad_(), drawn(V, D, seed=2).requires_grad_()
        teacher = [(1 / teachers, drawn(N, 24, seed=3 + 10 * i, dtype=dtype), drawn(V, 24, seed=4 + 10 * i, dtype=dtype))
                   for i in range(teachers)]
        target = torch.randint(V, (N,), generator=seeded(5)).to(DEVICE)
        target[[0, 9]] = -1
        loss, ce = q.ChunkedLoss.apply(hidden, head, target, CAP, teacher, weight, T)
        (3 * loss).backward()
        wide = [hidden.detach().double().requires_grad_(),  # the head too is rounded before its product
                head.detach().to(dtype).double().requires_grad_()]
        expected = q.plain_loss(*wide, target, CAP, [(x, h.double(), w.double()) for x, h, w in teacher], weight, T)
        (3 * expected[0]).backward()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert [loss.item(), ce.item()] == pytest.approx([x.item() for x in expected], rel=tolerance)
        for got, reference in ((hidden.grad, wide[0].grad), (head.grad, wide[1].grad)):
            assert (got.double() - reference).abs().max() < tolerance * reference.abs().max()
        assert not hidden.grad[[0, 9]].any() and hidden.grad.dtype == dtype and head.grad.dtype == torch.float32

    def test_true_token_probs(self, monkeypatch):
        V, padded, D = 2100, 2112, 24
        for name in ("CHUNK_LOGITS", "GPU_CHUNK_LOGITS"):
            monkeypatch.setattr(q, name, 7 * V)  # 20 rows a batch: the last chunk holds 6
        embed, head = drawn(V, D, seed=1, dtype=torch.bfloat16), drawn(padded, D, seed=2, dtype=torch.bfloat16)
        model = lambda tokens: (embed[tokens], None)
        model.head, model.vocab_size, model.cfg = head, V, SimpleNamespace(softcap=CAP)
        sequences = torch.randint(V, (5, 11), generator=seeded(3)).numpy().astype(np.uint16)
        got = q.true_token_probs(model, sequences, 2, q.World(device=torch.device(DEVICE)))
        tokens = torch.from_numpy(sequences.astype(np.int64)).to(DEVICE)
        z = embed[tokens[:, :-1]].double() @ head[:V].double().T
        log_p = torch.log_softmax(CAP * torch.tanh(z / CAP), dim=-1).gather(2, tokens[:, 1:, None]).flatten()
        np.testing.assert_allclose(got, log_p.exp().cpu().numpy(), rtol=1e-5)  # the absolute error of log p, as above
        # and as the plain path has it
        z, target = z.flatten(0, 1).float(), tokens[:, 1:].flatten()
        monkeypatch.setattr(q, "use_triton", lambda device_type: False)
        np.testing.assert_allclose(got, q.rows_probs(z, V, target, CAP).cpu().numpy(), rtol=1e-5)

    # one block and less; two and three blocks, ragged; k below a step, ragged, a multiple
    @pytest.mark.parametrize("n, r, k", [(1, 5, 3), (3, 128, 64), (1, 131, 70), (3, 300, 129), (1, 513, 40)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_symmetric_product(self, n, r, k, dtype):
        X, add = drawn(n, r, k, seed=1, dtype=dtype), drawn(n, r, r, seed=2)
        add = (add + add.mT).to(dtype)
        square = X.double() @ X.double().mT
        block = torch.arange(r, device=DEVICE) // q.SYMMETRIC_TILE["BLOCK"]
        mirrored = block[:, None] != block  # one on the diagonal is as symmetric as the order of its sums
        views = X, X.mT.contiguous().mT, torch.nn.functional.pad(X, (1, 2))[..., 1:k + 1]
        for view in views:
            for given in ((), (add, 0.7, -1.5)):
                got = q.symmetric_product(view, *given)
                expected = square if not given else 0.7 * square - 1.5 * add.double()
                assert torch.equal(got[:, mirrored], got.mT[:, mirrored]) and got.dtype == dtype and got.is_contiguous()
                # a float32 sum of k products in any order, two more for alpha and beta; then rounded
                size = X.double().abs() @ X.double().abs().mT + 1.5 * add.double().abs()
                bound = (k + 2) * 2 ** -24 * size + 1.01 * ROUNDING[dtype] * expected.abs()
                assert ((got.double() - expected).abs() <= bound).all()

    @pytest.mark.parametrize("rows, cols", [(300, 257), (256, 400), (255, 400)])
    def test_orthogonalize(self, rows, cols, monkeypatch):
        """Against the torch products. Both round to bf16 at the same places, but sums differ in order, so a factor may
        round another way, 2^-8, and the five slopes carry that on: measured 0.5% of the norm, where both are 1.2% from
        float32's."""
        calls, product = [], q.symmetric_product
        monkeypatch.setattr(q, "symmetric_product", lambda *given: calls.append(len(given)) or product(*given))
        G = drawn(2, rows, cols, seed=1)
        got = q.orthogonalize(G, torch.bfloat16).double()
        assert calls == ([1, 4] * 5 if min(rows, cols) >= 256 else [])
        assert not torch.equal(q.orthogonalize(G, torch.float32), got) and len(calls) in (0, 10)  # float32: torch's
        monkeypatch.setattr(q, "use_triton", lambda device_type: False)
        plain = q.orthogonalize(G, torch.bfloat16).double()
        assert (got - plain).norm() < 0.01 * plain.norm()
        values = torch.linalg.svdvals(got)
        assert 0.85 < values[values > 0.5].min() and values.max() < 1.15  # as in test_method.py


@outside
def test_under_the_interpreter():
    done = subprocess.run([sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::TestOnDevice"],
                          cwd=ROOT, env={**bare, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"\d\d passed", done.stdout) and "skipped" not in done.stdout, done.stdout


@outside
def test_choice_of_kernels(monkeypatch, capsys):
    choose = q.use_triton.__wrapped__
    assert choose("cuda") and not choose("cpu")
    assert not q.use_triton("cpu")  # so that tests in this process are those of plain torch
    monkeypatch.setattr(q, "triton", None)
    q.use_triton.cache_clear()
    try:
        assert not q.use_triton("cuda") and not q.use_triton("cuda") and not q.use_triton("cpu")
    finally:
        q.use_triton.cache_clear()
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("notice: triton is not installed") and err.count("\n") == 1  # once


@outside
def test_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch, train_q0 as q
hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
q.ChunkedLoss.apply(hidden, head, torch.arange(4), 15.0)[0].backward()
assert hidden.grad.any() and q.orthogonalize(torch.randn(1, 256, 256), torch.bfloat16).any()
"""
    done = subprocess.run([sys.executable, "-B", "-c", program], env={**bare, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@outside
def test_probability_of_a_certain_token_is_not_above_one(monkeypatch):
    """A GPU fuses multiplications and additions, so the cross-entropy of a certain token may come out as -5e-7."""
    class Kernel:
        def __getitem__(self, grid):
            return lambda z, teacher, target, scales, out, *rest, **options: out.copy_(torch.tensor([[0, -5e-7], [0, 1]]))

    monkeypatch.setattr(q, "use_triton", lambda device: True)
    monkeypatch.setattr(q, "loss_kernel", Kernel())
    p = q.rows_probs(torch.zeros(2, 8), 8, torch.tensor([0, 1]), CAP)
    assert p.tolist() == pytest.approx([1, math.exp(-1)]) and p.max() <= 1


@outside
@pytest.mark.parametrize("shape", [(2, 256, 512), (2, 512, 256)])
def test_muon_with_its_kernel_is_one_graph(shape, monkeypatch):
    """Traced as on a GPU, without a graph break: both products of the five iterations are calls of the kernel."""
    import torch.utils._triton
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(q, "use_triton", lambda device: True)
    graphs, one = [], torch.tensor(1.0)

    def traced(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return lambda *args: [torch.zeros(shape)]

    compiled = torch.compile(q.updated, backend=traced, dynamic=False, fullgraph=True)
    second = torch.zeros(shape[0], *((shape[1], 1) if shape[1] >= shape[2] else (1, shape[2])))
    compiled(torch.ones(shape), torch.ones(shape), torch.zeros(shape), second, one, one, one, torch.tensor(True), one,
             ("muon", 0.95, torch.bfloat16))
    assert len(graphs) == 1 and sum("triton" in name for name in graphs[0]) == 10


@outside
@pytest.mark.skipif(sys.platform != "linux", reason="the wheel's ptxas is for Linux")
def test_compiled_for_sm_90a(tmp_path):
    """Registers of each of 256 threads, bytes of shared memory; triton 3.7.1, 2026-11-25, no spills:

        loss_kernel, 32 bytes       evaluation (float32) 40, with teacher 80; gradient 34, with teacher 80
        symmetric_kernel, 98,304    106, with add 128; of a transposed X 112, with add 124

    Three programs of the loss and two of the product fit a multiprocessor (65,536 registers, 227 kB)."""
    done = subprocess.run([sys.executable, "-B", __file__], capture_output=True, text=True,
                          env={**bare, "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    table = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert len(table) == 8
    for row in table:
        assert row["spills"] == 0 and row["shared"] <= 227 * 1024, row
        assert row["registers"] * 256 * (2 if "ADD" in row else 3) <= 65536, row
        assert "ADD" not in row or 2 * row["shared"] <= 227 * 1024, row
        # tensor cores fed from shared memory; loads of 16 bytes, even where the vocabulary is odd
        assert row["wgmma"] if "ADD" in row else row["wide loads"], row


def compiled():
    """Print a line of JSON per kernel compiled for sm_90a: registers, spills, shared memory by the wheel's ptxas."""
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def one(kernel, constants, types, launch):
        names = kernel.arg_names
        types = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in names}
        wide = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
                if types[n][0] == "*" or types[n] == "i32" and n != "V"}  # as a launch finds them; V is odd: 50,257
        made = triton.compile(ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=wide),
                              target=GPUTarget("cuda", 90, 32), options=launch)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "k.ptx"
            path.write_text(made.asm["ptx"])
            ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
            said = subprocess.run([ptxas, "-v", "--gpu-name=sm_90a", path, "-o", path.with_suffix(".cubin")],
                                  capture_output=True, text=True, check=True).stderr
        print(json.dumps({"kernel": kernel.__name__, **{k: v for k, v in constants.items() if k.isupper()},
                          "registers": int(re.search(r"Used (\d+) registers", said)[1]),
                          "spills": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
                          "shared": made.metadata.shared,
                          "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
                          "wide loads": len(re.findall(r"ld\.global\S*\.v4", made.asm["ptx"]))}))

    for grad in (False, True):
        for teacher in (False, True):  # evaluation is in float32
            dtype = "*bf16" if grad or teacher else "*fp32"
            one(q.loss_kernel, dict(TEACHER=teacher, GRAD=grad, BLOCK=q.LOSS_BLOCK), dict(
                z=dtype, teacher=dtype, targets="*i64", scales="*fp32", out="*fp32", V="i32", width="i32"),
                dict(num_warps=8))
    tile = dict(q.SYMMETRIC_TILE)
    launch = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    for add in (False, True):
        for unit in ("row_stride", "col_stride"):  # of a transposed view, of a contiguous tensor
            one(q.symmetric_kernel, dict(ADD=add, WIDEN=False, **tile, **{unit: 1}), dict(
                dict.fromkeys(("X", "add", "out"), "*bf16"),
                **dict.fromkeys(("r", "k", "batch_stride", "row_stride", "col_stride"), "i32")), launch)


if __name__ == "__main__":
    compiled()
