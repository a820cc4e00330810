"""Shared by all tests: the repository on sys.path, and a corpus and a run to look at."""
import faulthandler
import functools
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

# models this small gain nothing from two threads, and one adds in one order; a waiting one sleeps
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import forks  # noqa: E402
import records.plot  # noqa: E402
import tiny  # noqa: E402
import train_q0 as q  # noqa: E402

HANDLERS = {number: signal.getsignal(number) for number in q.SIGNALS}


@pytest.fixture(autouse=True)
def nothing_stays():
    """A hang timer that a run armed would end pytest; its signals are pytest's again."""
    yield
    faulthandler.cancel_dump_traceback_later()
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder for what is made once and read by many tests."""
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A data folder of ~180k tokens."""
    folder = tmp_path_factory.mktemp("text") / "shards"
    return tiny.make_data(folder, tiny.learnable_documents(1400))


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
    """A copy of the repository, whose logs/ hold `run`."""
    return tiny.clone(tmp_path_factory.mktemp("clone") / "repo")


@pytest.fixture(scope="session")
def run(repo, corpus):
    """(folder, stdout) of one q0 run of four members, in a process of its own."""
    flags = [*tiny.SEVERAL, "--data", corpus, "--run", "first"]
    done = tiny.user(repo, "python", "train_q0.py", *flags)
    assert done.returncode == 0, done.stderr
    return repo / "logs/first", done.stdout


@pytest.fixture(scope="session")
def finished(run):
    """Its folder."""
    return run[0]


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.fixture(scope="session")
def killed(base):
    """A run that was killed in its step 12, with a state after every step."""
    logs = base / "killed/logs"
    forks.start(base, logs, *forks.EVERY_STEP, plant=forks.at_step(12)).dies()
    return logs / "x"


@pytest.fixture
def interrupted(killed, logs):
    """A copy of it, run x."""
    return shutil.copytree(killed, logs / "x")


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Runs of this process go here, and no curve is drawn, which takes longer than such a run."""
    monkeypatch.setattr(q, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(records.plot, "draw_curve", lambda *args: None)
    return tmp_path / "logs"


@pytest.fixture
def flags(corpus, logs):
    """A run of a fraction of a second; it is called x."""
    return [*tiny.MINI, "--data", str(corpus), "--run", "x"]


@pytest.fixture
def trained(flags, logs):
    """Runs in this process: trained(name, *more flags) -> folder."""
    def train(name, *more):
        assert q.main([str(a) for a in (*flags, "--run", name, *more)]) == 0
        return logs / name
    return train


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """Whether lm-evaluation-harness is here; without network and its own 14,000 files of tasks."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    try:
        import lm_eval.tasks
    except ImportError:
        return False
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    return True
