"""Check the folders of records from their logs and predictions, and rebuild the tables in
records/README.md.

    python records/check.py                        every folder, and whether the tables are current
    python records/check.py FOLDER ...             these, with their source's diff to a commit
    python records/check.py FOLDER --pack RUN ...  copy logs and predictions of runs to FOLDER/logs
    python records/check.py FOLDER --write-result  write FOLDER/result.json from the logs first
    python records/check.py --tables               rebuild the tables
    python records/check.py --source LOG           print the script that wrote a log, to rerun a row

Rules and tables: records/README.md. Exit status 1 and a line per problem. No network. Logs alone
are checked with the standard library; predictions and plans need what train_q0.py imports.
"""
import argparse
import ast
import collections
import datetime
import difflib
import functools
import hashlib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RECORDS = Path(__file__).resolve().parent
if __name__ == "__main__":  # run as a file, Python looks for modules in records/ alone
    sys.path.insert(0, str(RECORDS.parent))
try:
    from records import recompute
    MISTAKES = (recompute.q.UserError,)
except ImportError:  # without torch
    recompute = None
    MISTAKES = ()

SEEDS = 5  # of the rule
LEVEL = 0.99
PRINTED = 1.1e-5  # losses are logged with five decimals: the most by which two equal ones differ
WHOLE_STEPS = 1.05  # a cycle has a whole number of steps: the most by which it exceeds its epochs
MAX_LOG = 10_000_000  # bytes; 960 epochs of the published run are 2,000,000
MAX_SOURCE = 1_000_000
MACHINE = ("cpu", "threads", "torch", "gpu")  # what result.json says of it
# settings in which a rerun may differ from the row it repeats: the seed, and those of the machine
FREE = {"seed", "data", "precision", "device", "compile", "graphs", "recompute", "attention",
        "log_every", "save_minutes", "keep_members", "hang_minutes", "skip_nonfinite"}
HARDWARE = ("precision", "device", "compile", "graphs")  # no comparison may differ in these
# settings that other versions of the script lack, with the values they had there
ELSEWHERE = {"smear": False, "induction": False, "average": 0.0, "graphs": False,
             "rotary_base": 10_000, "momentum": 0.95, "lr_resid": 0.00025, "lr_x0": 0.025,
             "lr_mixing": 0.02, "split_tokens": 0.0}
BEGIN = "<!-- tables: made by records/check.py --tables -->\n"
END = "<!-- end of tables -->\n"
# what reading a missing, damaged or hostile file raises
FAULTS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, SyntaxError,
          RecursionError, MemoryError, OSError)


# The rule ---------------------------------------------------------------------------------------

def area(angle, df):
    """Of the density of Student's t up to sqrt(df) tan(angle), but for a factor: there it is
    cos(angle)^(df - 1)."""
    heights = (math.cos(angle * (i + 0.5) / 1000) ** (df - 1) for i in range(1000))
    return angle / 1000 * sum(heights)


def t_quantile(p, df):
    """Quantile (p > 1/2) of Student's t, by bisection of the angle."""
    low = 0.0
    high = math.pi / 2
    wanted = (2 * p - 1) * area(high, df)
    for _ in range(50):
        middle = (low + high) / 2
        if area(middle, df) < wanted:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(high)


def rule(old, new):
    """old - new >= t(0.99, df) * s * sqrt(1/n_old + 1/n_new), s the pooled standard deviation of
    the losses, 5 seeds or more each."""
    difference = statistics.mean(old) - statistics.mean(new)
    df = len(old) + len(new) - 2
    if not df:  # a run each
        return {"met": False, "df": df, "difference": round(difference, 7)}
    squares = sum((x - statistics.mean(side)) ** 2 for side in (old, new) for x in side)
    s = math.sqrt(squares / df)
    t = t_quantile(LEVEL, df)
    required = t * s * math.sqrt(1 / len(old) + 1 / len(new))
    enough = min(len(old), len(new)) >= SEEDS
    return {
        "met": enough and difference >= required,
        "df": df,
        "difference": round(difference, 7),
        "t": round(t, 7),
        "pooled_std": round(s, 7),
        "required": round(required, 7)}


# A log ------------------------------------------------------------------------------------------

@dataclass
class Log:
    source: str
    about: dict  # command, machine, configuration, data
    header: list  # lines of derived settings
    lines: list  # of events


@dataclass
class Plan:
    trajectories: int
    cycles: int
    members: int
    epochs: int


def unique(pairs):
    """A JSON object. Raises ValueError where it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def read_log(path):
    """A log.txt in its parts; a line of = ends the first two, and the source may hold such lines
    too. Raises one of FAULTS where it is not one."""
    if path.stat().st_size > MAX_LOG:
        raise ValueError(f"{path} is larger than {MAX_LOG} bytes")
    text = path.read_text(encoding="utf-8")
    parts = text.rsplit("=" * 100 + "\n", 2)
    if len(parts) < 3 or len(parts[0]) > MAX_SOURCE:
        raise ValueError(f"{path} is not the log.txt of a run")
    source, header, events = parts
    about, end = json.JSONDecoder(object_pairs_hook=unique).raw_decode(header)
    return Log(source, about, header[end:].splitlines(), events.splitlines())


@functools.lru_cache(maxsize=8)  # once for all seeds
def functions_and_settings(source):
    """({name: code of a function}, names of the fields of Config) of a script."""
    functions = {}
    settings = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = ast.unparse(node)
        elif isinstance(node, ast.ClassDef) and node.name == "Config":
            settings = {x.target.id for x in node.body if isinstance(x, ast.AnnAssign)}
    return functions, settings


def group(lines):
    """{first key: [{key: value}, ...]} of event lines. Raises ValueError for a key twice."""
    kinds = ("step", "member", "members", "final_val_loss")  # `members` begins an ensemble's line
    events = {kind: [] for kind in kinds}
    for line in lines:
        pairs = [word.split(":", 1) for word in line.split() if ":" in word]
        kind = pairs[0][0] if pairs else ""
        if kind in events:
            events[kind].append(unique(pairs))
    return events


def read_table(lines):
    """{k: [uniform, learned, pruned]} of event lines."""
    found = []
    for line in lines:
        words = line.split()
        if len(words) == 4 and words[0].isdigit():
            found.append((int(words[0]), [float(x) for x in words[1:]]))
    return unique(found)


def read_weights(lines):
    """{member: weight under the prior}, the largest first; those below 0.0005 are not printed."""
    line, = [x for x in lines if x.startswith("prior gap:")]
    _, _, weights = line.partition("  weights (member:weight) ")
    pairs = [word.split(":") for word in weights.split(" ")]
    return unique([(int(member), float(weight)) for member, weight in pairs])


def numbers(pattern, lines):
    """The ints that the groups of `pattern` find in the one line that it matches whole."""
    found = [match.groups() for match in map(re.compile(pattern).fullmatch, lines) if match]
    only, = found
    return [int(x) for x in only]


def losses_of(events):
    return [float(pairs["val_loss"]) for pairs in events]


def same(first, *others):
    return all(abs(x - first) <= PRINTED for x in others)


def one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def attempt(make, *args):
    """What `make` returns, or None where a file is missing or not what it should be."""
    try:
        return make(*args)
    except FAULTS:
        return None


def settings(config):
    """Settings in the terms of every version of the script: what one lacks has the value that it
    had there, and epochs a cycle follow from others. Earlier ones said by how much decay starts
    above its end. Decay in two digits, so that a row can be rerun in either way of saying it."""
    decay = config["weight_decay"]
    if "wd_floor" in config:
        ends = (decay * config["wd_floor"], decay)
    else:
        ends = (decay * config["wd_start"], decay * config["wd_end"])
    found = dict(ELSEWHERE)
    for key, value in config.items():
        if not key.startswith("wd_") and key not in ("weight_decay", "epochs_per_cycle"):
            found[key] = value
    found["decay"] = [f"{x:.2g}" for x in ends]
    return found


# One run: its log, and what must agree in it ----------------------------------------------------

class Run:
    """A log."""

    def __init__(self, path):
        log = read_log(path)
        self.path = path
        self.name = path.name
        self.seed, = numbers(r"(?:new|old)_seed(\d+)\.txt", [path.name])
        self.source = log.source
        self.functions, self.settings = functions_and_settings(log.source)
        self.config = log.about["config"]
        self.machine = log.about["machine"]
        self.place = {**self.machine, **{x: self.config.get(x) for x in HARDWARE}}
        self.data = {k: v for k, v in log.about["data"].items() if k != "name"}
        self.script = log.about.get("script")
        start = datetime.datetime.fromisoformat(log.about["time"])
        self.start = start.replace(tzinfo=None)
        plan = r"population: (\d+) trajectories x (\d+) cycles = (\d+) members, (\d+) epochs .*"
        self.plan = Plan(*numbers(plan, log.header))
        steps = r"steps: (\d+) of \d+ tokens \(\d+ at the edges\), (\d+) tokens in all, (\d+) an "
        self.steps, self.tokens, self.epoch_tokens = numbers(steps + "epoch", log.header)
        self.parameters, = numbers(r"parameters: (\d+); .*", log.header)
        self.edited = any("--allow-edited" in line for line in log.lines)
        self.table = read_table(log.lines)
        self.weights = read_weights(log.lines)
        self.events = group(log.lines)
        self.final, = self.events["final_val_loss"]
        self.loss = float(self.final["final_val_loss"])
        self.score = self.loss  # or that with members that count
        members = [int(pairs["member"]) for pairs in self.events["member"]]
        self.losses = unique(list(zip(members, losses_of(self.events["member"]))))
        self.trained = [(pairs["step"], pairs["loss"]) for pairs in self.events["step"]]

    def checks(self, track, earlier):
        """(holds, what if not): the track's limits, and each number against every other line that
        implies it."""
        yield from self.origin(track, earlier)
        yield from self.limits(track)
        yield from self.work()
        if recompute:
            yield from self.recomputed(track)
        yield from self.mixtures()
        yield from self.end(track)

    def origin(self, track, earlier):
        """Its script, its settings and its data."""
        cfg = self.config
        lacks = ", ".join(sorted(cfg.keys() ^ self.settings))
        yield not lacks, f"its settings are not those of its script: {lacks}"
        wanted = track["data"]
        if earlier:  # their data had no splits, their run no script
            splits = [x for x in wanted.values() if isinstance(x, list)]
            wanted = {f["name"]: f["sha256"] for files in splits for f in files}
        else:
            script = hashlib.sha256(json.dumps(self.source).encode()).hexdigest()
            yield self.script == script, "it did not begin with the script at its head"
        if "tokenizer" in self.data:  # which --split-tokens reads
            wanted = {**wanted, "tokenizer": track.get("tokenizer")}
        keys = {**wanted, **self.data}
        differ = [x for x in keys if wanted.get(x) != self.data.get(x)]
        yield not differ, f"its data are not the track's: {', '.join(differ)}"
        yield not self.edited, "its script was edited on the way (--allow-edited)"

    def limits(self, track):
        """Of the track, on settings."""
        cfg = self.config
        plan = self.plan
        yield cfg["seed"] == self.seed, f"its seed is {cfg['seed']}"
        budget = str(cfg["epochs"]) in track["reference_members"]
        yield budget, f"{cfg['epochs']} epochs is not a budget of the track"
        yield cfg["report"] == "val", f"it reports on {cfg['report']}, not val"
        yield cfg.get("teacher") is None, "another run taught it (--teacher), at no epochs"
        for name in ("train_tokens", "seq_len"):
            flag = "--" + name.replace("_", "-")
            yield cfg[name] == track[name], f"{flag} must be {track[name]}"
        epoch = track["tokens"]["train"]
        yield (self.epoch_tokens == epoch,
               f"{self.epoch_tokens} tokens an epoch are not the track's {epoch}")
        most = track["max_parameters"] or math.inf
        yield self.parameters <= most, f"{self.parameters} parameters are too many"
        counts = (cfg["trajectories"], cfg["cycles"], cfg["trajectories"] * cfg["cycles"])
        yield plan == Plan(*counts, cfg["epochs"]), "its plan is not of its configuration"
        yield (self.tokens <= plan.epochs * self.epoch_tokens * WHOLE_STEPS,
               f"{self.tokens} tokens are more than {plan.epochs} epochs")

    def work(self):
        """Members and steps against the plan."""
        plan = self.plan
        members = self.events["member"]
        counted = len(members) == plan.members  # before anything is made of what the log claims
        yield counted, f"its {len(members)} member lines are not the {plan.members} planned"
        if not counted:
            return
        at = [[int(pairs[x]) for x in ("member", "traj", "cycle")] for pairs in members]
        wanted = [[i, i // plan.cycles, i % plan.cycles + 1] for i in range(plan.members)]
        yield at == wanted, "its member lines are not in the planned order"
        ends = [int(pairs["epochs"]) for pairs in members]
        yield (ends == sorted(set(ends)) and ends[-1] == plan.epochs,
               f"its members do not end at epoch {plan.epochs}")
        steps = [[int(x) for x in pairs["step"].split("/")] for pairs in self.events["step"]]
        yield (steps == sorted(steps) and steps[-1] == [self.steps, self.steps],
               f"its step lines do not lead to step {self.steps}")

    def recomputed(self, track):
        """What follows from its settings, unless an edited script counts in its own way."""
        config = recompute.checked({**ELSEWHERE, **self.config})
        members = self.events["member"]
        if config.trajectories * config.cycles != len(members):
            return
        edited = self.source not in versions()
        found = recompute.plan(config, self.epoch_tokens)
        planned = (found.steps, found.tokens) == (self.steps, self.tokens)
        at = [{key: int(pairs[key]) for key in found.members[0]} for pairs in members]
        own = edited and recompute.differs(self.functions, recompute.PLANS)
        yield (own or planned and at == found.members,
               f"its settings make {found.steps} steps, {found.tokens} tokens and other members")
        parameters = recompute.parameters(config, track["vocab_size"])
        own = edited and recompute.differs(self.functions, recompute.MODELS)
        yield (own or parameters == self.parameters,
               f"its settings make {parameters} parameters")

    def mixtures(self):
        """Ensembles of the members so far against these members."""
        mixed = self.events["members"]
        own = losses_of(self.events["member"])
        counts = [str(n) for n in range(1, len(own) + 1) for _ in ("uniform", "learned")]
        found = [(p["members"], p["k"], p["prior"]) for p in mixed]
        if found != list(zip(counts, counts, ["uniform", "learned"] * len(own))):
            yield False, "its ensemble lines do not follow its member lines"
            return
        uniform = losses_of(mixed[0::2])
        learned = losses_of(mixed[1::2])
        yield (same(own[0], uniform[0], learned[0]),
               "an ensemble of one is not its member")
        for n in range(1, len(own)):
            highest = (n * uniform[n - 1] + own[n]) / (n + 1)  # -log is convex
            yield (uniform[n] <= highest + 2 * PRINTED,
                   f"a uniform mixture of {n + 1} is worse than its parts: one of these losses is "
                   "wrong")

    def few(self, track):
        """How many members the second column of the tables allows."""
        M = self.plan.members
        return min(track["reference_members"][str(self.plan.epochs)] or M, M)

    def end(self, track):
        """The table and the final line against the members and ensembles."""
        M = self.plan.members
        rows = {1, self.few(track), M}
        wanted = ", ".join(map(str, sorted(rows)))
        yield rows <= self.table.keys(), f"its table lacks a row of k = {wanted}"
        best = next(iter(self.weights))
        uniform, learned, _ = self.table[1]
        yield (same(uniform, learned, self.losses[best]),
               f"its table at k = 1 is not the loss of member {best}")
        uniform, *fitted = self.table[M]
        *_, last_uniform, last_learned = losses_of(self.events["members"])
        yield (same(uniform, last_uniform),
               f"its table at k = {M} is not the last uniform ensemble line")
        yield same(self.loss, last_learned), "final_val_loss is not the last learned ensemble line"
        yield same(self.loss, *fitted), f"final_val_loss is not the table's at k = {M}"
        counts = [int(self.final[x]) for x in ("members", "k", "epochs")]
        yield counts == [M, M, self.plan.epochs], "its final line is wrong"


# Source: what was edited ------------------------------------------------------------------------

def git(*argv):
    """What git says in the repository of these records."""
    done = subprocess.run(["git", *argv], cwd=RECORDS.parent, capture_output=True, encoding="utf-8")
    return done.stdout


@functools.lru_cache(maxsize=None)
def versions():
    """{text: commit} of every committed train_q0.py; empty without git or its whole history."""
    if not shutil.which("git") or git("rev-parse", "--is-shallow-repository") != "false\n":
        return {}
    # -m: a merge may hold a text that no other commit has; it names one for each parent
    found = git("log", "-m", "--diff-filter=AM", "--format=%h", "--", "train_q0.py").split()
    return {git("show", f"{c}:./train_q0.py"): c for c in dict.fromkeys(found)}


def lines_apart(a, b):
    """How many lines only one of two texts has."""
    first = collections.Counter(a.splitlines())
    second = collections.Counter(b.splitlines())
    return (first - second).total() + (second - first).total()


def source_lines(source, who, whole):
    """How the script of `who` differs from the nearest committed version."""
    known = versions()
    if not known:
        return f"  {who}: notice: no git history here, so its script is not compared\n"
    nearest = source
    if source not in known:
        nearest = min(known, key=lambda text: lines_apart(text, source))
    of = f"train_q0.py of commit {known[nearest]}"
    diff = list(difflib.unified_diff(nearest.splitlines(True), source.splitlines(True), of, who))
    text = f"  {who}: {of}"
    if diff:
        text += f", {sum(line[0] in '+-' for line in diff[2:])} lines edited"
    if whole:
        return f"{text}\n{''.join(diff)}"
    return f"{text}\n"


# One folder -------------------------------------------------------------------------------------

def summary(losses):
    spread = round(statistics.stdev(losses), 7) if len(losses) > 1 else None
    return {"val_loss": losses, "mean": round(statistics.mean(losses), 7), "std": spread}


def is_rerun(config, row):
    """Whether settings are those of a row."""
    alike = all(config[x] == row[x] for x in (config.keys() & row.keys()) - FREE)
    return alike and config.keys() - FREE == row.keys() - FREE


def is_repeated(run, before):
    """Whether a log is that of another run: by its seed, its losses, or most of its step lines."""
    trained = set(run.trained)
    lines = len(trained & set(before.trained))
    if run.seed == before.seed or 2 * lines > len(trained):
        return True
    return (run.losses, run.table) == (before.losses, before.table)


class Record:
    """A folder: its runs, what is wrong with it, and its result."""

    def __init__(self, path, tracks):
        self.path = path
        self.track = tracks.get(path.parent.name)
        self.name = f"{path.parent.name}/{path.name}"
        self.problems = []
        self.runs = {"new": [], "old": []}
        self.packed = {"new": [], "old": []}
        self.result = None
        self.budget = None
        self.date = attempt(datetime.date.fromisoformat, path.name[:10])
        self.need(self.date and re.fullmatch(r"[\d-]{10}_\w+", path.name),
                  "its name is not <YYYY-MM-DD>_<Name>")
        self.need(self.track and path.parent.parent == RECORDS,
                  "it is not in the folder of a track of tracks.json")
        self.earlier = bool(self.track) and path.name in self.track["without_predictions"]
        self.readme = ""
        inside = [path, *path.rglob("*")]
        odd = [f for f in inside if f.is_symlink() or not (f.is_file() or f.is_dir())]
        self.need(not odd, "it holds a link, or what is no regular file: "
                  f"{', '.join(f.name for f in odd[:3])}")
        if odd:  # to read it may never end, to write it may change what lies elsewhere
            return
        self.readme = attempt(lambda: (path / "README.md").read_text(encoding="utf-8")) or ""
        self.need(self.readme.strip() and "TODO" not in self.readme,
                  "its README.md is missing or not filled in")
        if self.track:
            self.need(self.track["data"] and self.track["tokens"],
                      "tracks.json lacks data and tokens of its track: the first row sets them")
            for file in sorted(path.glob("logs/*")):
                self.read(file)
        self.need(self.runs["new"], "it has no logs/new_seed<S>.txt")
        if not self.earlier:
            self.need(recompute, "its predictions cannot be checked here: install "
                      "requirements.txt")
            self.need(versions(), "no git history here, so its scripts cannot be checked: take a "
                      "whole clone (git fetch --unshallow)")

    def need(self, holds, text):
        if not holds:
            self.problems.append(text)

    def read(self, file):
        """Take a log and what it says against itself and against its predictions."""
        kinds = ["txt", "xz"]
        if "counted" in self.track:
            kinds.append("json")
        name = re.fullmatch(rf"(new|old)_seed\d+\.({'|'.join(kinds)})", file.name)
        self.need(name, f"logs/{file.name} is not named new_seed<S> or old_seed<S>, "
                  f".{' or .'.join(kinds)}")
        if not name or name[2] != "txt":
            return
        run = attempt(Run, file)
        found = []
        whole = attempt(lambda: found.extend(run.checks(self.track, self.earlier)) or True)
        found.append((whole, "is not the whole log.txt of a complete run"))
        for holds, text in found:
            self.need(holds, f"logs/{file.name}: {text}")
        if not run:
            return
        self.runs[name[1]].append(run)
        if recompute and not self.earlier and all(holds for holds, _ in found):
            self.unpack(run, name[1])

    def unpack(self, run, side):
        """Take the predictions of a run and what they say against its log."""
        file = f"logs/{run.path.stem}"
        try:
            packed = recompute.Packed(run, self.track)
            differ = [text for holds, text in packed.checks() if not holds]
        except FAULTS as e:
            self.need(False, f"{file}: its predictions are missing or damaged ({one_line(e)}): "
                      "--pack makes them")
            return
        self.need(not differ, f"{file} and its log disagree: {', '.join(differ[:3])}")
        self.packed[side].append(packed)

    def compare(self, records):
        """What must agree between the runs; `result`, all that they say. `records` hold the row
        that this one beats."""
        new = sorted(self.runs["new"], key=lambda run: run.start)
        old = sorted(self.runs["old"], key=lambda run: run.start)
        self.compare_seeds(new)
        self.compare_seeds(old)
        for side in self.packed.values():
            self.compare_predictions(side)
        self.need(all(run.place == new[0].place for run in new + old),
                  f"several machines: hardware, versions, processes or {', '.join(HARDWARE)} "
                  "differ")
        self.need(max(run.start for run in new + old).date() <= self.date,
                  "its date is before its last run")
        if min(len(new), len(old)) >= 2:
            mixed = old[0].start < new[-1].start and new[0].start < old[-1].start
            self.need(mixed, "its old and new runs are not interleaved in time")
        self.summarize(new)
        if old:
            self.result["comparison"] = self.against(new, old, records)

    def compare_seeds(self, runs):
        """Runs of one side differ by the seed alone."""
        for i, run in enumerate(runs):
            first = runs[0]
            alike = {**run.config, "seed": None} == {**first.config, "seed": None}
            self.need(run.source == first.source and alike,
                      f"{run.name} differs from {first.name} in more than the seed")
            again = [before.name for before in runs[:i] if is_repeated(run, before)]
            self.need(not again, f"{run.name} repeats the run of another log: {', '.join(again)}")

    def compare_predictions(self, side):
        """Packed runs of one side: each its own, and as far from the others as its log says."""
        for i, packed in enumerate(side):
            again = [x.run.name for x in side[:i] if recompute.repeats(packed, x)]
            self.need(not again, f"{packed.run.name} has the predictions of {', '.join(again)}")
            others = side[:i] + side[i + 1:]
            self.need_apart(packed.run.name, [packed], others)

    def need_apart(self, what, some, others):
        """Losses must differ from those of `others` as packed predictions do."""
        if some and others:
            allowed, found = recompute.apart(some, others)
            self.need(found <= allowed, f"{what}: its loss is {found:.4f} further from the others' "
                      f"than its predictions say, more than {allowed:.4f}")

    def summarize(self, new):
        """Set result, but for the comparison."""
        first = new[0]
        M = first.plan.members
        epochs = first.config["epochs"]
        k = self.track["reference_members"][str(epochs)]
        capped = None
        if k:
            capped = {"k": k, **summary([run.table[run.few(self.track)][1] for run in new])}
        self.start = first.start
        self.budget = (self.path.parent.name, epochs)
        self.result = {
            "track": self.path.parent.name,
            "epochs": epochs,
            "members": M,
            "parameters": first.parameters,
            "machine": {x: first.machine[x] for x in MACHINE},
            "seeds": [run.seed for run in new],
            **summary([run.score for run in new]),
            "capped_k": capped,
            "comparison": None}
        if "counted" in self.track:
            losses = [run.loss for run in new]
            self.result["neural"] = {**summary(losses), **rule(losses, self.result["val_loss"])}

    def against(self, new, old, records):
        """The comparison with an earlier row, which the old runs repeat; None without one."""
        repeated = old[0]
        rows = [r for r in records if self.may_beat(r, settings(repeated.config))]
        if not rows or repeated.config["epochs"] != new[0].config["epochs"]:
            self.need(False, "its old_seed logs repeat no earlier row of this track and budget")
            return None
        sources = [(r.runs["new"][0].source, r.path.name) for r in rows]
        source, row = min(sources, key=lambda pair: (pair[0] != repeated.source, pair[1]))
        committed = {source, repeated.source} <= versions().keys()
        self.need(source == repeated.source or committed or self.earlier and not versions(),
                  f"its old_seed logs have neither the script of {row} nor, like that row, a "
                  "committed one")
        screened = re.search(r"^Screened on seeds: *(none|\d+(?:[ ,]+\d+)*)[. ]*$",
                             self.readme, re.M)
        self.need(screened, "its README.md lacks the line `Screened on seeds: 1, 2, 3` (or none)")
        tried = re.findall(r"\d+", screened[1]) if screened else []
        self.need(not any(str(run.seed) in tried for run in new),
                  "it was screened on seeds that confirm it")
        if not self.earlier:
            seeds = [sorted(run.seed for run in side) for side in (old, new)]
            self.need(seeds[0] == seeds[1], "its old and new runs have other seeds")
            self.need_apart("its new runs", self.packed["new"], self.packed["old"])
        losses = [run.score for run in old]
        return {
            "against": row,
            "seeds": [run.seed for run in old],
            **summary(losses),
            **rule(losses, [run.score for run in new])}

    def may_beat(self, row, rerun):
        """Whether `row` is an earlier one of this track, with the settings that were rerun."""
        if row is self or row.problems or row.track is not self.track or row.date > self.date:
            return False
        return is_rerun(settings(row.runs["new"][0].config), rerun)

    def check_result(self, write):
        """result.json against the logs."""
        path = self.path / "result.json"
        if write and not self.problems:
            new = path.with_name("result.json.tmp")
            new.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            new.replace(path)
        stored = attempt(lambda: json.loads(path.read_text(encoding="utf-8")))
        self.need(stored == self.result,
                  "its result.json is not what the logs say: --write-result makes it")


def evidence(record, records):
    """✓: the rule is met; Ⓧ: it is not; first: seeds enough, and no earlier row of that budget
    (but one rerun with it)."""
    n = len(record.result["seeds"])
    against = record.result["comparison"]
    if against:
        return f"(n={n}) ✓" if against["met"] else f"(n={n}) Ⓧ"
    for other in records:
        if other.budget == record.budget and other.start < record.start:
            rerun = other.result["comparison"] or {}
            if rerun.get("against") != record.path.name:
                return f"(n={n}) Ⓧ"
    return f"(n={n}) first" if n >= SEEDS else f"(n={n}) Ⓧ"


# Tables and command line ------------------------------------------------------------------------

def row_of(record, rank, records):
    """Cells of a table."""
    result = record.result
    beside = result.get("neural") or result["capped_k"]
    against = result["comparison"]
    return [
        rank,
        f"{result['mean']:.4f} {evidence(record, records)}",
        f"{beside['mean']:.4f}" if beside else "-",
        result["members"],
        result["epochs"],
        record.date,
        "without" if record.earlier else "with",
        f"[{record.path.name[11:]}]({record.name})",
        against["against"][11:] if against else "-"]


def tables(tracks, records):
    """The text between the marks in README.md."""
    out = []
    for name, track in tracks.items():
        for epochs, k in track["reference_members"].items():
            rows = []  # (loss, cells)
            for p in track["published"]:
                what = f"{p['name']} (others' result)"
                cells = ["-", p["loss"], "-", "-", p["epochs"], "-", "-", what, "-"]
                rows.append((p["loss"], cells))
            mine = [r for r in records if r.budget == (name, int(epochs))]
            mine.sort(key=lambda record: record.result["mean"])
            for rank, record in enumerate(mine, 1):
                rows.append((record.result["mean"], row_of(record, rank, records)))
            if not rows:
                continue
            rows.sort(key=lambda row: row[0])
            lines = [f"| {' | '.join(map(str, cells))} |" for _, cells in rows]
            beside = f"at most {k or '?'} members"
            if "counted" in track:
                beside = "without counting"
            head = (f"| rank | loss | {beside} | members | epochs | date | predictions | row "
                    "| against |")
            out += [f"### {name}, {epochs} epochs", "", head, "|---" * 9 + "|", *lines, ""]
    return "\n".join(out) + "\n"


def show(record, records, whole):
    """Print what is known of a record and what is wrong with it."""
    if record.result:
        print(f"{record.name}: {record.result['mean']:.5f} {evidence(record, records)}")
        for key, value in record.result.items():
            print(f"  {key}: {json.dumps(value)}")
        for side, runs in record.runs.items():
            if runs:
                print(source_lines(runs[0].source, side, whole), end="")
        if record.earlier:
            print("  without predictions: its losses are as its logs print them")
        if "counted" in record.track and not recompute.text_of(record.track):
            print("  notice: data/wiki is not here, so what counting gains is not checked")
    for text in record.problems:
        print(f"{record.name}: problem: {text}")


def are_tables_current(tracks, records, rebuild):
    """Whether README.md holds the tables of `records`; `rebuild` writes them first."""
    path = RECORDS / "README.md"
    text = path.read_text(encoding="utf-8")
    before, _, _ = text.partition(BEGIN)
    _, _, after = text.partition(END)
    fresh = before + BEGIN + "\n" + tables(tracks, records) + END + after
    if rebuild:
        path.write_text(fresh, encoding="utf-8")
    return rebuild or text == fresh


def take_seeds(track, records):
    """The next free seed of a track, whose rows with predictions must have taken all before it in
    order."""
    free = track["first_seed"]
    later = [r for r in records if r.track is track and not r.earlier and r.runs["new"]]
    later.sort(key=lambda r: (min(run.seed for run in r.runs["new"]), r.path.name))
    for record in later:
        taken = sorted(run.seed for run in record.runs["new"])
        wanted = list(range(free, free + len(taken)))
        record.need(taken == wanted, f"its seeds must be the next ones, {wanted[0]} to "
                    f"{wanted[-1]}: chosen seeds prove nothing")
        free += len(taken)
    return free


def read_tracks():
    """{name: limits} of tracks.json; a track has those of the one that it is `like`, too."""
    tracks = json.loads((RECORDS / "tracks.json").read_text(encoding="utf-8"))
    return {name: {**tracks.get(track.get("like"), {}), **track}
            for name, track in tracks.items()}


def check(record, records, write):
    """What a folder says against others, and its result.json. A fault is a problem of its own."""
    try:
        record.compare(records)
        record.check_result(write)
    except FAULTS as e:
        record.need(False, f"it cannot be checked ({one_line(e)})")


def pack(folder, runs):
    """Copy logs and predictions of runs, called new_seed<S> and old_seed<S>; of a counted run,
    those of the run it was made of, and what counting gave. Raises UserError or one of FAULTS where
    a run is missing or damaged."""
    if not recompute:
        raise ValueError("--pack needs what requirements.txt lists")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for run in runs:
        about = json.loads((run / "result.json").read_text(encoding="utf-8"))
        if "counted_of" in about:
            if "neighbours" in [entry.get("kind") for entry in about["curve"]]:
                raise ValueError(f"{run} was counted with --neighbours, which no row is")
            run = run.resolve().parent / about["counted_of"]
            loss = round(about["final_val_loss"], 5)
            found = {"val_loss": loss, "strength": about["gate"]["strength"]}
            if not (run / "log.txt").exists():
                raise ValueError(f"{run}, which was counted, is not there or has no log: copy it "
                                 "there; a pool or an average is no row")
            (folder / f"logs/{run.name}.json").write_text(json.dumps(found) + "\n")
        shutil.copyfile(run / "log.txt", folder / f"logs/{run.name}.txt")
        recompute.pack(run, folder / f"logs/{run.name}.xz")


def show_all(args):
    """Check folders and tables. Returns the exit status."""
    tracks = read_tracks()
    committed = [folder for track in tracks for folder in RECORDS.glob(f"{track}/*")]
    records = [Record(folder, tracks) for folder in sorted({*args.folders, *committed})]
    free = {name: take_seeds(track, records) for name, track in tracks.items()}
    for record in records:
        if not record.problems:
            check(record, records, args.write_result and record.path in args.folders)
    shown = [r for r in records if r.path in args.folders or not args.folders]
    for record in shown:
        show(record, records, bool(args.folders))
    bad = sum(len(record.problems) for record in shown)
    if not args.folders:
        for file in sorted(RECORDS.glob("negative/*.md")):
            print(f"negative/{file.name}")
        if not are_tables_current(tracks, records, args.tables and not bad):
            bad += 1
            print("README.md: problem: its tables are not current: mend any problem above, then "
                  "--tables rebuilds them")
    for name, seed in free.items():
        print(f"{name}: the next row takes seeds from {seed} on")
    print(f"{len(shown)} folders, {bad} problems")
    return int(bad > 0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", type=lambda f: Path(f).resolve())
    parser.add_argument("--pack", nargs="+", metavar="RUN", type=Path, default=[])
    parser.add_argument("--source", metavar="LOG", type=Path)
    parser.add_argument("--write-result", action="store_true")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.source:
            print(read_log(args.source).source, end="")
            return 0
        if args.pack:
            if len(args.folders) != 1:
                raise ValueError("--pack wants one FOLDER before it")
            pack(args.folders[0], args.pack)
    except (*FAULTS, *MISTAKES) as e:
        sys.exit(f"check.py: error: {one_line(e)}")
    return 0 if args.pack else show_all(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main())
