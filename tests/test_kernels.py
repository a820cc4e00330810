"""The Triton kernels against float64, and compiled ahead for an H100.

TestOnDevice runs where the kernels do: here if there is a GPU, and always in a process of its own
under Triton's interpreter, through the dispatch that a GPU takes."""
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

INTERPRETED = q.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
CAP = 15.0
ROUNDING = {torch.bfloat16: 2 ** -8, torch.float32: 2 ** -24}  # to nearest: half of the last bit
bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
outside = pytest.mark.skipif(INTERPRETED, reason="not a test of the interpreter")
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def drawn(*shape, seed=0, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def exact(z, teacher, target, softcap, weight, T):
    """(loss, cross-entropy, gradient by z) of raw logits by plain_loss in float64: with the
    identity as head, hidden states are logits."""
    z = z.double().requires_grad_()
    eye = torch.eye(z.size(1), dtype=torch.float64, device=z.device)
    teachers = [] if teacher is None else [(1.0, teacher.double(), eye)]
    loss, ce = q.plain_loss(z, eye, target, softcap, teachers, weight, T)
    loss.backward()
    return loss.item(), ce.item(), z.grad


def widened(x, padding):
    """x with columns of padding, in front of memory that is not its own."""
    wide = torch.nn.functional.pad(x, (0, padding))
    room = torch.cat((wide.flatten(), torch.full((5000,), 7.0).to(wide)))
    return room[:wide.numel()].view_as(wide), room


def check_rows_loss(z, teacher, target, weight, T, padding=0, softcap=CAP):
    V = z.size(1)
    kept = (target >= 0).float()
    wide, room = widened(z, padding)
    wide_teacher = None if teacher is None else widened(teacher, padding)[0]
    scale = kept / kept.sum()
    loss, ce, d = q.rows_loss(wide, wide_teacher, V, target, scale, softcap, weight, T)
    loss_, ce_, d_ = exact(z, teacher, target, softcap, weight, T)
    # float32 logits of up to 15 err by 15 * 2^-23 = 2e-6, a few times over; a cap's by 2^-23 of it
    error = max(1e-5, 2 ** -22 * softcap)
    assert abs(ce.item() - ce_) < error
    assert abs(loss.item() - loss_) < 2 * error
    assert d.data_ptr() == wide.data_ptr()  # in place
    bound = error / kept.sum() + 1.01 * ROUNDING[z.dtype] * d_.abs()
    assert ((d[:, :V].double() - d_).abs() <= bound).all()
    assert not d[:, V:].any()
    assert not d[target < 0].any()
    assert (room[d.numel():] == 7).all()


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(),
                    reason="no GPU here; test_under_the_interpreter runs these tests")
class TestOnDevice:
    @pytest.fixture(autouse=True)
    def rounding_to_nearest(self, monkeypatch):
        """The interpreter cuts bf16 off where a GPU rounds: twice the error, and a bias."""
        if not INTERPRETED:
            return
        from triton.runtime import interpreter
        convert = interpreter._convert_float

        def nearest(x, source, target, mode):
            if (source, target) != (triton.language.float32, triton.language.bfloat16):
                return convert(x, source, target, mode)
            bits = np.ascontiguousarray(x).view(np.float32)
            return torch.from_numpy(bits).bfloat16().view(torch.uint16).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", nearest)

    def test_the_trial_run_passes(self):
        assert q.use_triton(DEVICE)

    # columns: less than a block and no multiple of a vector; several blocks, the last one ragged
    @pytest.mark.parametrize("rows, V, padding", [(7, 100, 28), (7, 2501, 0), (3, 4096, 64)])
    @both_precisions
    def test_rows_loss(self, rows, V, padding, dtype):
        z = drawn(rows, V, seed=1, dtype=dtype, size=4)
        teacher = drawn(rows, V, seed=2, dtype=dtype, size=4)
        target = torch.arange(rows, device=DEVICE)
        target[0] = V - 1  # in the last block
        for T, weight in ((1.0, 0.0), (1.2, 0.45), (0.7, 1.0)):
            check_rows_loss(z, teacher, target, weight, T, padding)
        check_rows_loss(z, None, target, 0.45, 1.2, padding)  # cross-entropy, whatever the weight

    @pytest.mark.parametrize("softcap", [0.0, 1000.0])
    def test_no_cap_and_the_largest(self, softcap):
        z = drawn(7, 2501, seed=1, size=20)
        teacher = drawn(7, 2501, seed=2, size=20)
        target = torch.arange(7, device=DEVICE)
        check_rows_loss(z, teacher, target, 0.45, 1.2, 59, softcap)
        check_rows_loss(z, None, target, 0.0, 1.0, 59, softcap)

    def test_maxima_that_rise_and_fall_from_block_to_block(self):
        """At T = 0.1 sums of exp(x / T) overflow unless they are relative to a maximum."""
        slope = torch.linspace(-20, 20, 5000).to(DEVICE).expand(3, -1).contiguous()
        target = torch.tensor([0, 2500, 4999], device=DEVICE)
        scale = torch.full((3,), 1 / 3, device=DEVICE)
        for z, teacher in ((slope, -slope), (-slope, slope), (slope, slope)):
            for T in (1.0, 0.1):
                given = (z.clone(), teacher.clone(), 5000, target, scale, CAP, 0.45, T)
                loss, ce, d = q.rows_loss(*given)
                loss_, ce_, d_ = exact(z, teacher, target, CAP, 0.45, T)
                assert (loss.item(), ce.item()) == pytest.approx((loss_, ce_), abs=1e-5)
                assert (d.double() - d_).abs().max() < 1e-5 / 3

    @both_precisions
    def test_ignored_targets_and_saturated_logits(self, dtype):
        z = drawn(7, 300, seed=1, dtype=dtype, size=40)  # most are beyond the soft-cap
        teacher = drawn(7, 300, seed=2, dtype=dtype, size=40)
        z[:, ::5] /= 20
        z[1, :2] = torch.tensor([3000, -3000])
        for targets in ([5, -1, 0, 299, -1, 7, 7], [-1] * 6 + [0]):
            target = torch.tensor(targets, device=DEVICE)
            check_rows_loss(z, teacher, target, 0.45, 1.2)
            check_rows_loss(z, None, target, 0.0, 1.0)

    @pytest.mark.parametrize("teachers", [0, 1, 2])
    @both_precisions
    def test_chunked_loss(self, dtype, teachers, monkeypatch):
        """From hidden states, in chunks, an odd vocabulary. In bf16 logits, their gradient and its
        products are rounded by up to 2^-8 each: measured 0.6% of the largest gradient."""
        N, D, V, padded = 11, 40, 1001, 1024
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for name in ("CHUNK_LOGITS", "GPU_CHUNK_LOGITS"):
            monkeypatch.setattr(q, name, 4 * padded)
        hidden = drawn(N, D, seed=1, dtype=dtype).requires_grad_()
        head = drawn(padded, D, seed=2, dtype=dtype).requires_grad_()
        teacher = []
        for i in range(teachers):
            states = drawn(N, 24, seed=3 + i, dtype=dtype)
            teacher.append((1 / teachers, states, drawn(padded, 24, seed=5 + i, dtype=dtype)))
        target = torch.arange(N, device=DEVICE)
        target[[0, 9]] = -1
        settings = (0.45, 1.2) if teachers else ()
        losses = q.ChunkedLoss.apply(hidden, head, V, target, CAP, teacher, *settings)
        losses[0].backward()
        h = hidden.detach().double().requires_grad_()
        w = head.detach()[:V].double().requires_grad_()
        wide = [(share, x.double(), y[:V].double()) for share, x, y in teacher]
        wanted = q.plain_loss(h, w, target, CAP, wide, *settings)
        wanted[0].backward()
        for found, reference in zip(losses, wanted):
            assert found.item() == pytest.approx(reference.item(), rel=tolerance)
        for found, reference in ((hidden.grad, h.grad), (head.grad[:V], w.grad)):
            assert (found - reference).abs().max() < tolerance * reference.abs().max()
        assert not hidden.grad[[0, 9]].any()
        assert not head.grad[V:].any()

    @pytest.mark.parametrize("softcap", [CAP, 0.0])
    def test_true_token_probs(self, softcap, monkeypatch):
        V, padded, D = 2100, 2112, 24
        for name in ("CHUNK_LOGITS", "GPU_CHUNK_LOGITS"):
            monkeypatch.setattr(q, name, 7 * padded)  # 20 rows a batch: the last chunk holds 6
        embed = drawn(V, D, seed=1, dtype=torch.bfloat16)
        head = drawn(padded, D, seed=2, dtype=torch.bfloat16)

        def model(tokens):
            return embed[tokens], None

        model.head = head
        model.vocab_size = V
        model.dtype = torch.bfloat16
        model.cfg = SimpleNamespace(softcap=softcap)
        sequences = np.random.default_rng(3).integers(0, V, (5, 11)).astype(np.uint16)
        world = q.World(device=torch.device(DEVICE))
        found = q.true_token_probs(model, sequences, 2, world)
        tokens = torch.from_numpy(sequences.astype(np.int64)).to(DEVICE)
        z = embed[tokens[:, :-1]].double() @ head[:V].double().T
        logits = softcap * torch.tanh(z / softcap) if softcap else z
        target = tokens[:, 1:, None]
        wanted = torch.softmax(logits, dim=-1).gather(2, target).flatten()
        np.testing.assert_allclose(found, wanted.cpu().numpy(), rtol=1e-5)

    # one block and less; two and three blocks, ragged; k below a step, ragged, a multiple
    @pytest.mark.parametrize("n, r, k", [(1, 5, 3), (3, 128, 64), (1, 300, 129), (1, 513, 40)])
    @both_precisions
    def test_symmetric_product(self, n, r, k, dtype):
        X = drawn(n, r, k, seed=1, dtype=dtype)
        add = drawn(n, r, r, seed=2)
        add = (add + add.mT).to(dtype)
        square = X.double() @ X.double().mT
        size = X.double().abs() @ X.double().abs().mT + 1.5 * add.double().abs() + 2.5
        eye = torch.eye(r, device=DEVICE)
        block = torch.arange(r, device=DEVICE) // q.SYMMETRIC_TILE["BLOCK"]
        mirrored = block[:, None] != block  # one on the diagonal: as the order of its sums
        padded = torch.nn.functional.pad(X, (1, 2))[..., 1:k + 1]
        for view in (X, X.mT.contiguous().mT, padded):
            for given in ((), (add, 0.7, -1.5, 2.5)):
                found = q.symmetric_product(view, *given)
                wanted = square
                if given:
                    wanted = 0.7 * square - 1.5 * add.double() + 2.5 * eye
                assert torch.equal(found[:, mirrored], found.mT[:, mirrored])
                # a float32 sum of k products in any order, more for alpha, beta, gamma
                rounding = 1.01 * ROUNDING[dtype] * wanted.abs()
                bound = (k + 3) * 2 ** -24 * size + rounding
                assert ((found.double() - wanted).abs() <= bound).all()

    @pytest.mark.parametrize("rows, cols", [(256, 400), (255, 400)])
    def test_polar_express(self, rows, cols, monkeypatch):
        """Against the same five steps in float64: measured 1.2% of the norm, 1.1% with torch's."""
        calls = []
        product = q.symmetric_product

        def counted(*given):
            calls.append(len(given))
            return product(*given)

        monkeypatch.setattr(q, "symmetric_product", counted)
        X = drawn(2, rows, cols, seed=1)
        X = X / (1.02 * X.norm(dim=(1, 2), keepdim=True))
        narrow = X.bfloat16()
        wanted = q.polar_express(narrow.double())
        found = q.polar_express(narrow)
        assert (found - wanted).norm() < 0.015 * wanted.norm()
        assert calls == ([1, 5] * 5 if rows >= 256 else [])  # one block has nothing to mirror
        calls.clear()
        q.polar_express(X)
        assert not calls  # float32: torch's


@outside
def test_under_the_interpreter():
    command = [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, f"{__file__}::TestOnDevice"], cwd=ROOT, text=True,
                          env={**bare, "TRITON_INTERPRET": "1"}, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout


# ------------------------------------------------------------------------------------------------
# Whether the kernels are used

def launch_in_torch(z, teacher_z, V, target, scale, softcap, weight, temperature, grad):
    """As launch_loss_kernel, for rows of one scale."""
    rest = (V, target, scale, softcap, weight, temperature)
    loss, ce, _ = q.rows_loss_in_torch(z, teacher_z, *rest)
    return torch.stack((loss, ce)).expand(len(z), 2)


def square_in_torch(X):
    return X @ X.mT


def off_by_one_percent(launch):
    def wrong(z, *given, **options):
        out = launch(z, *given, **options)
        z *= 1.01
        return out
    return wrong


def fails(*given, **options):
    raise RuntimeError("Python.h: No such file or directory")


@outside
@pytest.mark.parametrize("launch, square, reason", [
    (launch_in_torch, square_in_torch, None),
    (off_by_one_percent(launch_in_torch), square_in_torch, "disagrees"),
    (launch_in_torch, lambda X: 1.1 * X @ X.mT, "disagrees"),
    (fails, square_in_torch, "Python.h: No such file"),
    (launch_in_torch, fails, "Python.h: No such file")])
def test_kernels_are_trusted_after_a_trial_run(launch, square, reason, monkeypatch, capsys):
    monkeypatch.setattr(q, "INTERPRETED", True)
    monkeypatch.setattr(q, "launch_loss_kernel", launch)
    monkeypatch.setattr(q, "symmetric_product", square)
    used = q.use_triton.__wrapped__("cpu")
    said = capsys.readouterr().err
    assert used == (reason is None)
    if used:
        assert said == ""
    else:
        assert said.startswith("notice: loss and Muon go without their Triton kernels")
        assert reason in said
        assert said.count("\n") == 1


@outside
def test_a_gpu_without_triton_says_so_once(monkeypatch, capsys):
    assert not q.use_triton("cpu")
    monkeypatch.setattr(q, "triton", None)
    q.use_triton.cache_clear()
    assert not q.use_triton("cuda")
    assert not q.use_triton("cuda")
    said = capsys.readouterr().err
    q.use_triton.cache_clear()
    assert "triton is not installed (pip install triton)" in said
    assert said.count("\n") == 1


@outside
def test_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch, train_q0 as q
hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
q.ChunkedLoss.apply(hidden, head, 16, torch.arange(4), 15.0)[0].backward()
assert hidden.grad.any() and q.polar_express(torch.randn(1, 256, 256).bfloat16()).any()
"""
    done = subprocess.run([sys.executable, "-B", "-c", program], text=True, capture_output=True,
                          env={**bare, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@outside
def test_probability_of_a_certain_token_is_not_above_one(monkeypatch):
    """A GPU fuses multiplications and additions: a certain token may have a loss of -5e-7."""
    losses = torch.tensor([[0, -5e-7], [0, 1]])
    monkeypatch.setattr(q, "use_triton", lambda device_type: True)
    monkeypatch.setattr(q, "launch_loss_kernel", lambda *given, grad: losses)
    p = q.rows_probs(torch.zeros(2, 8), 8, torch.tensor([0, 1]), CAP)
    assert p.tolist() == pytest.approx([1, math.exp(-1)])
    assert p.max() <= 1


# ------------------------------------------------------------------------------------------------
# Compiled ahead, in a process of its own: this file as a script

@outside
@pytest.mark.skipif(sys.platform != "linux", reason="the wheel's ptxas is for Linux")
def test_compiled_for_sm_90a(tmp_path):
    """Three programs of the loss and two of the product fit a multiprocessor (65,536 registers,
    227 kB); no spills; tensor cores fed from shared memory, loads of 16 bytes."""
    done = subprocess.run([sys.executable, "-B", __file__], capture_output=True, text=True,
                          env={**bare, "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    table = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(table) == 9
    for row in table:
        is_loss = row["kernel"] == "loss_kernel"
        programs = 3 if is_loss else 2
        assert row["spills"] == 0, row
        assert programs * 256 * row["registers"] <= 65_536, row
        assert programs * row["shared"] <= 227 * 1024, row
        assert row["wide loads"] if is_loss else row["wgmma"], row


def resources(ptx):
    """(registers, bytes spilled) by the wheel's ptxas."""
    from triton.backends import nvidia
    ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", "--gpu-name=sm_90a", path, "-o", path.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    spilled = re.findall(r"(\d+) bytes spill", done.stderr)
    return int(re.search(r"Used (\d+) registers", done.stderr)[1]), sum(map(int, spilled))


def compile_ahead(kernel, constants, types, options):
    """Print a line of JSON about a kernel compiled for sm_90a."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    signature = {}
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "fp32")
        # as a launch finds them; V is odd: 50,257
        if signature[name][0] == "*" or (signature[name] == "i32" and name != "V"):
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    registers, spills = resources(ptx)
    print(json.dumps({"kernel": kernel.__name__, **constants, "registers": registers,
                      "spills": spills, "shared": made.metadata.shared,
                      "wgmma": ptx.count("wgmma.mma_async"),
                      "wide loads": len(re.findall(r"ld\.global\S*\.v4", ptx))}))


def compile_all():
    # evaluation is in float32 and has no teacher; a model without a cap trains too
    for grad, teacher, softcap in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (1, 1, 0)):
        dtype = "*bf16" if grad or teacher else "*fp32"
        types = dict(z=dtype, teacher=dtype, targets="*i64", scales="*fp32", out="*fp32", V="i32",
                     width="i32")
        constants = dict(TEACHER=bool(teacher), GRAD=bool(grad), CAPPED=bool(softcap),
                         BLOCK=q.LOSS_BLOCK)
        compile_ahead(q.loss_kernel, constants, types, dict(num_warps=8))
    tile = dict(q.SYMMETRIC_TILE)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    for add in (False, True):
        for unit in ("row_stride", "col_stride"):  # of a transposed view, of a contiguous tensor
            types = dict.fromkeys(("X", "add", "out"), "*bf16")
            types |= dict.fromkeys(("r", "k", "batch_stride", "row_stride", "col_stride"), "i32")
            constants = dict(ADD=add, WIDEN=False, **tile, **{unit: 1})
            compile_ahead(q.symmetric_kernel, constants, types, options)


if __name__ == "__main__":
    compile_all()
