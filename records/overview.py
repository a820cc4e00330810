"""Commands of train_q0.py about all runs: `runs` lists them."""
import contextlib
import datetime
import platform
import time
from dataclasses import fields

import train_q0 as q
from records.plot import check_file, entries_of, print_columns

SHOWN = ("population", "epochs", "trajectories", "cycles")  # settings


def runs(argv):
    """List the runs under logs/, the newest last. One is running where a launch trains a trajectory
    of it, here or on another machine; its loss is that of all members so far."""
    q.Parser(prog="train_q0.py runs", description=runs.__doc__).parse_args(argv)
    folders = []
    with contextlib.suppress(FileNotFoundError):
        folders = [path for path in q.LOGS.iterdir() if path.is_dir() and path.name[0] != "."]
    if not folders:
        print(f"no runs under {q.LOGS}")
        return
    rows = [line_of(folder) for folder in folders]
    print_columns([("run", "date", "population", "epochs", "members", "state", "loss"),
                   *sorted(rows, key=lambda row: row[1])])


def line_of(folder):
    """(run, date, population, epochs, members, state, loss) as texts."""
    try:
        with q.reading(folder):
            return folder.name, *facts_of(folder)
    except q.UserError:
        date = "-"
        with contextlib.suppress(OSError):  # it may be gone
            date = shown(datetime.datetime.fromtimestamp(folder.stat().st_mtime))
        return folder.name, date, "-", "-", "-", "broken", "-"


def shown(date):
    return f"{date:%Y-%m-%d %H:%M}"


def facts_of(folder):
    """The rest of a line. Raises what q.reading turns into one line."""
    about = read(folder / "run.json")
    config = about["config"]
    for f in fields(q.Config):
        if f.name in SHOWN:
            q.check_value(f, config[f.name])
    written = datetime.datetime.fromtimestamp((folder / "run.json").stat().st_mtime)
    date = datetime.datetime.fromisoformat(about.get("time", written.isoformat()))
    planned = config["trajectories"] * config["cycles"]
    population = config["population"]
    for made, word in (("pool_of", "pool"), ("average_of", "mean"), ("counted_of", "counted")):
        if made in about:
            population += f" {word}"
    split = config.get("report", "val")
    loss = "-"
    if (folder / "result.json").exists():
        result = read(folder / "result.json")
        done = planned = len(result["curve"])
        loss = f"{result[f'final_{split}_loss']:.5f}"
        state = "complete"
    else:
        done = len(list(folder.glob("predictions/*.safetensors")))
        entries = entries_of(folder)
        if entries:
            loss = f"{entries[-1]['learned']:.5f}"
        state = "running" if any(map(is_held, folder.glob("state/*[0-9].lock"))) else "stopped"
    return shown(date), population, str(config["epochs"]), f"{done}/{planned}", state, loss


def read(path):
    check_file(path)
    return q.load_json(path)


def is_held(path):
    """Whether a launch holds a trajectory's lock (train_q0.Lock); nothing is changed."""
    check_file(path)
    holder = path.read_text(encoding="utf-8")
    if holder == platform.node() and q.fcntl:
        with open(path, "rb") as file, contextlib.suppress(OSError):
            try:
                q.fcntl.flock(file, q.fcntl.LOCK_SH | q.fcntl.LOCK_NB)
                return False  # a launch was killed
            except BlockingIOError:
                return True
    return holder != "" and time.time() - path.stat().st_mtime < q.SILENT_SECONDS
