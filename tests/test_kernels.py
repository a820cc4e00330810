"""The Triton kernel against float64, and compiled ahead for an H100.

TestOnDevice runs where the kernel does: here if there is a GPU, and always in a process of its own
under Triton's interpreter, through the dispatch that a GPU takes."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ROOT, plain_loss

triton = pytest.importorskip("triton", reason="triton is not installed")

import train_q0 as q  # noqa: E402: after the check for triton

INTERPRETED = q.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
CAP = 15.0
ROUNDING = {torch.bfloat16: 2 ** -8, torch.float32: 2 ** -24}  # to nearest: half of the last bit
outside = pytest.mark.skipif(INTERPRETED, reason="not a test of the interpreter")
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def drawn(*shape, seed=0, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    draw = size * torch.randn(*shape, generator=generator)
    return draw.to(DEVICE, dtype)


def exact(z, teacher, target, softcap, weight, T):
    """(loss, cross-entropy, gradient by z) of raw logits by plain_loss in float64: with the
    identity as head, hidden states are logits."""
    z = z.double().requires_grad_()
    eye = torch.eye(z.size(1), dtype=torch.float64, device=z.device)
    teachers = []
    if teacher is not None:
        teachers.append((1.0, teacher.double(), eye))
    loss, ce = plain_loss(z, eye, target, softcap, teachers, weight, T)
    loss.backward()
    return loss, ce, z.grad


def widened(x, padding):
    """x with columns of padding, and the memory that holds it; more follows."""
    wide = F.pad(x, (0, padding))
    after = torch.full((5000,), 7.0).to(wide)
    memory = torch.cat((wide.flatten(), after))
    return memory[:wide.numel()].view_as(wide), memory


def check_rows_loss(z, teacher, target, weight, T, padding=0, softcap=CAP):
    """Against float64: logits of up to 15 err by 15 * 2^-23 = 2e-6, a few times over; those of a
    larger cap by 2^-23 of it."""
    V = z.size(1)
    kept = (target >= 0).float()
    wide, memory = widened(z, padding)
    wide_teacher = None
    if teacher is not None:
        wide_teacher, _ = widened(teacher, padding)
    settings = (softcap, weight, T)
    share = kept / kept.sum()
    kernel = q.use_triton(z.device.type)
    rows_loss = q.rows_loss_in_triton if kernel else q.rows_loss_in_torch
    loss, ce, d = rows_loss(wide, wide_teacher, V, target, share, *settings)
    loss_, ce_, d_ = exact(z, teacher, target, *settings)
    error = max(1e-5, 2 ** -22 * softcap)
    assert abs(ce - ce_) < error
    assert abs(loss - loss_) < 2 * error
    assert d.data_ptr() == wide.data_ptr()  # in place
    bound = error / kept.sum() + 1.01 * ROUNDING[z.dtype] * d_.abs()
    assert ((d[:, :V] - d_).abs() <= bound).all()
    assert not d[:, V:].any()
    assert not d[target < 0].any()
    assert (memory[d.numel():] == 7).all()


@pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
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
            wide = np.ascontiguousarray(x).view(np.float32)
            rounded = torch.from_numpy(wide).bfloat16()
            return rounded.view(torch.uint16).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", nearest)

    def test_the_trial_run_passes(self):
        assert q.use_triton(DEVICE)

    # columns: less than a block and no multiple of a vector; several blocks, the last one ragged
    @pytest.mark.parametrize("rows, V, padding", [
        (7, 100, 28),
        (7, 2501, 0),
        (3, 4096, 64)])
    @both_precisions
    def test_rows_loss(self, rows, V, padding, dtype):
        z = drawn(rows, V, seed=1, dtype=dtype, size=4)
        teacher = drawn(rows, V, seed=2, dtype=dtype, size=4)
        target = torch.arange(rows, device=DEVICE)
        target[0] = V - 1  # in the last block
        for T, weight in ((1.2, 0.45), (0.7, 1.0)):
            check_rows_loss(z, teacher, target, weight, T, padding)
        # without a teacher cross-entropy, whatever the weight
        check_rows_loss(z, None, target, 0.45, 1.2, padding)

    @pytest.mark.parametrize("softcap, T", [(q.KERNEL_CAP, 1.0), (q.KERNEL_CAP / 2, 0.5)])
    def test_the_largest_cap(self, softcap, T):
        """Sums of exp(x / T) over all of its range, and in blocks of one end each."""
        slope = torch.linspace(-90, 90, 5000).expand(3, -1).to(DEVICE)
        target = torch.tensor([0, 2500, 4999], device=DEVICE)
        for sign in (1, -1):
            check_rows_loss(slope, sign * slope, target, 0.45, T, 0, softcap)

    @pytest.mark.parametrize("targets", [
        [5, -1, 0, 299, -1, 7, 7],
        [-1] * 6 + [0]])
    @both_precisions
    def test_ignored_targets_and_saturated_logits(self, targets, dtype):
        z = drawn(7, 300, seed=1, dtype=dtype, size=40)  # most are beyond the soft-cap
        teacher = drawn(7, 300, seed=2, dtype=dtype, size=40)
        z[:, ::5] /= 20
        z[1, :2] = torch.tensor([3000, -3000])
        target = torch.tensor(targets, device=DEVICE)
        check_rows_loss(z, teacher, target, 0.45, 1.2)
        check_rows_loss(z, None, target, 0.0, 1.0)


def python(*argv, **environment):
    """Run Python in a process of its own."""
    inherited = {**os.environ, "PYTHONPATH": str(ROOT)}
    inherited.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-B", *map(str, argv)], cwd=ROOT,
                          env={**inherited, **environment}, capture_output=True, text=True)


@outside
def test_under_the_interpreter():
    """The kernel alone, and the losses that are made of it."""
    done = python(
        "-m", "pytest", "-p", "no:cacheprovider",
        f"{__file__}::TestOnDevice", ROOT / "tests/test_loss.py", "-k",
        "TestOnDevice or (chunked_loss and 3-5.0) or true_token", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout


def raises(*given):
    raise RuntimeError("Python.h: No such file or directory")


def loss_off_by_a_percent(*given):
    loss, ce, gradient = q.rows_loss_in_torch(*given)
    return loss, ce, 1.01 * gradient


@outside
@pytest.mark.parametrize("loss, reason", [
    (q.rows_loss_in_torch, ""),
    (loss_off_by_a_percent, "goes without its Triton kernel.*disagrees"),
    (raises, "goes without its Triton kernel.*Python.h: No such file")])
def test_the_kernel_is_trusted_after_a_trial_run(loss, reason, monkeypatch, capsys):
    monkeypatch.setattr(q, "INTERPRETED", True)
    monkeypatch.setattr(q, "rows_loss_in_triton", loss)
    used = q.use_triton.__wrapped__("cpu")
    said = capsys.readouterr().err
    assert used == (reason == "")
    assert said.count("\n") == (0 if used else 1)
    assert re.search(reason, said)


@outside
def test_without_triton():
    """A GPU is told once how to get it; without one nothing is said."""
    done = python("-c", """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch, train_q0 as q
hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
q.ChunkedLoss.apply(hidden, head, 16, torch.arange(4), 15.0)[0].backward()
assert not q.use_triton("cuda") and not q.use_triton("cuda")
""")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    assert "triton is not installed (pip install triton)" in done.stderr


TYPES = dict(targets="*i64", scales="*fp32", out="*fp32", V="i32", width="i32")


def compiled(kernel, constants, types, options):
    """The kernel for sm_90a; all but V, which is odd, are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    signature = {}
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else types.get(name, "fp32")
        signature[name] = kind
        if kind[0] == "*" or (kind == "i32" and name != "V"):
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@outside
@pytest.mark.parametrize("taught, dtype", [(False, "*fp32"), (True, "*bf16")])
def test_the_loss_compiles_for_sm_90a(taught, dtype, monkeypatch, tmp_path):
    """Loads are of 16 bytes; three programs fit a multiprocessor's memory."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    constants = dict(TEACHER=taught, BLOCK=q.LOSS_BLOCK)
    types = dict(TYPES, z=dtype, teacher=dtype)
    made = compiled(q.loss_kernel, constants, types, dict(num_warps=8))
    assert re.search(r"ld\.global\S*\.v4", made.asm["ptx"])
    assert 3 * made.metadata.shared <= 227 * 1024
