"""Check the folders of records from their logs alone, and rebuild the tables in records/README.md.

    python records/check.py                        every folder, and whether the tables are current
    python records/check.py FOLDER ...             these, with their source's diff to a commit
    python records/check.py FOLDER --write-result  write FOLDER/result.json from the logs first
    python records/check.py --tables               rebuild the tables
    python records/check.py --source LOG           print the script that wrote a log, to rerun a row

Rules and tables: records/README.md. Exit status 1 and a line per problem. Standard library alone,
no network.
"""
import argparse
import ast
import collections
import datetime
import difflib
import functools
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
SEEDS = 5  # of the rule
LEVEL = 0.99
PRINTED = 1.1e-5  # losses are logged with five decimals: the most by which two equal ones differ
MACHINE = ("cpu", "threads", "torch", "gpu")  # what makes two runs comparable
# settings in which a rerun may differ from the row it repeats: the seed, and those of the machine
FREE = {"seed", "data", "precision", "device", "compile", "graphs", "recompute", "attention",
        "log_every", "save_minutes", "keep_members", "hang_minutes", "skip_nonfinite"}
BEGIN = "<!-- tables: made by records/check.py --tables -->\n"
END = "<!-- end of tables -->\n"


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

parse_python = functools.lru_cache(ast.parse)  # once for all seeds


@dataclass
class Log:
    source: str
    about: dict  # command, machine, configuration, data
    header: str  # derived settings
    lines: list  # of events


@dataclass
class Plan:
    trajectories: int
    cycles: int
    members: int
    epochs: int


def read_log(path):
    """A log.txt in its parts; a line of = ends the first two, and the source may hold such lines
    too."""
    text = path.read_text(encoding="utf-8")
    source, header, events = text.rsplit("=" * 100 + "\n", 2)
    about, end = json.JSONDecoder().raw_decode(header)
    return Log(source, about, header[end:], events.splitlines())


def group(lines):
    """{first key: [{key: value}, ...]} of event lines."""
    kinds = ("step", "member", "members", "final_val_loss")  # `members` begins an ensemble's line
    events = {kind: [] for kind in kinds}
    for line in lines:
        pairs = dict(re.findall(r"([\w/]+):(\S+)", line))
        kind = next(iter(pairs), "")
        if kind in events:
            events[kind].append(pairs)
    return events


def read_table(lines):
    """{k: [uniform, learned, pruned]} of event lines."""
    row = re.compile(r" *(\d+)" + r" +(\d+\.\d+)" * 3)
    found = {}
    for match in filter(None, map(row.fullmatch, lines)):
        k, *losses = match.groups()
        found[int(k)] = [float(x) for x in losses]
    return found


def numbers(pattern, text):
    """The ints that the groups of `pattern` find."""
    return [int(x) for x in re.search(pattern, text).groups()]


def losses_of(events):
    return [float(pairs["val_loss"]) for pairs in events]


def same(first, *others):
    return all(abs(x - first) <= PRINTED for x in others)


def attempt(make, *args):
    """What `make` returns, or None where a file is missing or not what it should be."""
    try:
        return make(*args)
    except (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError,
            OSError):
        return None


def settings(config):
    """Settings in the terms of today's script: earlier ones had no induction heads, no smear and
    no average, and said by how much decay starts above its end. Decay in two digits, so that a
    row can be rerun in either way of saying it."""
    decay = config["weight_decay"]
    if "wd_floor" in config:
        ends = (decay * config["wd_floor"], decay)
    else:
        ends = (decay * config["wd_start"], decay * config["wd_end"])
    found = {"smear": False, "induction": False, "average": 0.0}
    for key, value in config.items():
        if not key.startswith("wd_") and key != "weight_decay":
            found[key] = value
    found["decay"] = [f"{x:.2g}" for x in ends]
    return found


# One run: its log, and what must agree in it ----------------------------------------------------

class Run:
    """A log. Trajectories with processes of their own add NAME_trajectory<J>.txt."""

    def __init__(self, path):
        log = read_log(path)
        parse_python(log.source)
        self.name = path.name
        self.seed, = numbers(r"_seed(\d+)", path.name)
        self.source = log.source
        self.config = log.about["config"]
        self.machine = {x: log.about["machine"][x] for x in MACHINE}
        self.data = {k: v for k, v in log.about["data"].items() if k != "name"}
        start = datetime.datetime.fromisoformat(log.about["time"])
        self.start = start.replace(tzinfo=None)
        self.read_header(log.header)
        self.table = read_table(log.lines)
        prior = r"\nprior gap:\S+  weights \(member:weight\) (\d+):"
        self.best, = numbers(prior, "\n".join(log.lines))
        others = [read_log(p) for p in sorted(path.parent.glob(f"{path.stem}_trajectory*.txt"))]
        self.alike = all(x.source == self.source and x.about["config"] == self.config
                         for x in others)
        self.parts = [group(x.lines) for x in (log, *others)]
        self.final, = self.parts[0]["final_val_loss"]
        self.loss = float(self.final["final_val_loss"])
        self.losses = {}
        for events in self.parts:
            for pairs in events["member"]:
                self.losses[int(pairs["member"])] = float(pairs["val_loss"])

    def read_header(self, header):
        plan = r"population: (\d+) trajectories x (\d+) cycles = (\d+) members, (\d+) epochs"
        self.plan = Plan(*numbers(plan, header))
        steps = r"steps: (\d+) of .* (\d+) tokens in all, (\d+) an epoch"
        self.steps, self.tokens, self.epoch_tokens = numbers(steps, header)
        self.parameters, = numbers(r"parameters: (\d+);", header)

    def checks(self, track):
        """(holds, what if not): the track's limits, and each number against every other line that
        implies it."""
        yield from self.limits(track)
        yield from self.work()
        for events in self.parts:
            members = len(events["member"])
            counts = [str(n) for n in range(1, members + 1) for _ in ("uniform", "learned")]
            found = [(p["members"], p["k"], p["prior"]) for p in events["members"]]
            if found != list(zip(counts, counts, ["uniform", "learned"] * members)):
                yield False, "its ensemble lines do not follow its member lines"
                return
            yield from self.mixtures(events)
        yield from self.end(track)

    def limits(self, track):
        """Of the track, on data and settings."""
        cfg = self.config
        plan = self.plan
        hashes = track["data"] or {}
        files = {**hashes, **self.data}
        differ = [f for f in files if hashes.get(f) != self.data.get(f)]
        yield not differ, f"data hashes are not the track's: {', '.join(differ)}"
        yield cfg["seed"] == self.seed, f"its seed is {cfg['seed']}"
        budget = str(cfg["epochs"]) in track["reference_members"]
        yield budget, f"{cfg['epochs']} epochs is not a budget of the track"
        yield cfg["report"] == "val", f"it reports on {cfg['report']}, not val"
        wanted = track["train_tokens"]
        yield cfg["train_tokens"] == wanted, f"--train-tokens must be {wanted}"
        most = track["max_parameters"] or math.inf
        yield self.parameters <= most, f"{self.parameters} parameters are too many"
        planned = Plan(cfg["trajectories"], cfg["cycles"], cfg["trajectories"] * cfg["cycles"],
                       cfg["epochs"])
        yield (plan == planned and self.alike,
               "its plan, or the log of a trajectory, is not of its configuration")
        batch = max(cfg["batch_tokens"], cfg["edge_batch_tokens"])
        slack = plan.members * batch  # a cycle has a whole number of steps
        yield (self.tokens <= plan.epochs * self.epoch_tokens + slack,
               f"{self.tokens} tokens are more than {plan.epochs} epochs")

    def work(self):
        """Members and steps against the plan."""
        plan = self.plan
        members = [pairs for events in self.parts for pairs in events["member"]]
        members.sort(key=lambda pairs: int(pairs["member"]))
        at = [[int(pairs[x]) for x in ("member", "traj", "cycle")] for pairs in members]
        wanted = [[i, i // plan.cycles, i % plan.cycles + 1] for i in range(plan.members)]
        yield at == wanted, f"its {len(at)} member lines are not the {plan.members} planned"
        ends = [int(pairs["epochs"]) for pairs in members]
        yield (ends == sorted(set(ends)) and ends[-1:] == [plan.epochs],
               f"its members do not end at epoch {plan.epochs}")
        total = 0
        for events in self.parts:
            steps = [[int(x) for x in pairs["step"].split("/")] for pairs in events["step"]]
            last, planned = steps[-1]
            if steps != sorted(steps) or last != planned:
                total = math.nan
            total += last
        yield total == self.steps, f"its step lines do not lead to step {self.steps}"

    def mixtures(self, events):
        """Ensembles of the members so far against these members."""
        own = losses_of(events["member"])
        uniform = losses_of(events["members"][0::2])
        learned = losses_of(events["members"][1::2])
        yield (same(own[0], uniform[0], learned[0]),
               "an ensemble of one is not its first member")
        for n in range(1, len(own)):
            highest = (n * uniform[n - 1] + own[n]) / (n + 1)  # -log is convex
            yield (uniform[n] <= highest + 2 * PRINTED,
                   f"a uniform mixture of {n + 1} is worse than its parts: one of these losses is "
                   "wrong")

    def end(self, track):
        """The table and the final line against the members and ensembles."""
        M = self.plan.members
        epochs = self.plan.epochs
        reference = track["reference_members"].get(str(epochs)) or M
        rows = {1, min(reference, M), M}
        wanted = ", ".join(map(str, sorted(rows)))
        yield rows <= self.table.keys(), f"its table lacks a row of k = {wanted}"
        uniform, learned, _ = self.table[1]
        yield (same(uniform, learned, self.losses[self.best]),
               f"its table at k = 1 is not the loss of member {self.best}")
        uniform, *fitted = self.table[M]
        if len(self.parts) == 1:  # else the last ensemble line is of one trajectory
            *_, last_uniform, last_learned = losses_of(self.parts[0]["members"])
            yield (same(uniform, last_uniform),
                   f"its table at k = {M} is not the last uniform ensemble line")
            yield (same(self.loss, last_learned),
                   "final_val_loss is not the last learned ensemble line")
        yield same(self.loss, *fitted), f"final_val_loss is not the table's at k = {M}"
        counts = [int(self.final[x]) for x in ("members", "k", "epochs")]
        yield counts == [M, M, epochs], "its final line is wrong"


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
    commits = git("log", "--diff-filter=AM", "--format=%h", "--", "train_q0.py").split()
    return {git("show", f"{c}:./train_q0.py"): c for c in commits}


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
    """Whether settings are those of a row; a later version adds some."""
    return all(config[x] == row[x] for x in (config.keys() & row.keys()) - FREE)


class Record:
    """A folder: its runs, what is wrong with it, and its result."""

    def __init__(self, path, tracks):
        self.path = path
        self.track = tracks.get(path.parent.name)
        self.name = f"{path.parent.name}/{path.name}"
        self.problems = []
        self.runs = {"new": [], "old": []}
        self.result = None
        self.budget = None
        self.date = attempt(datetime.date.fromisoformat, path.name[:10])
        self.need(self.date and re.fullmatch(r"[\d-]{10}_\w+", path.name),
                  "its name is not <YYYY-MM-DD>_<Name>")
        self.need(self.track and path.parent.parent == RECORDS,
                  "it is not in the folder of a track of tracks.json")
        self.readme = attempt(lambda: (path / "README.md").read_text(encoding="utf-8")) or ""
        self.need(self.readme.strip() and "TODO" not in self.readme,
                  "its README.md is missing or not filled in")
        if self.track:
            for file in sorted(path.glob("logs/*")):
                self.read(file)
        self.need(self.runs["new"], "it has no logs/new_seed<S>.txt")

    def need(self, holds, text):
        if not holds:
            self.problems.append(text)

    def read(self, file):
        """Take a log and what it says against itself."""
        name = re.fullmatch(r"(new|old)_seed\d+(_trajectory\d+)?\.txt", file.name)
        self.need(name, f"logs/{file.name} is not named new_seed<S>.txt or old_seed<S>.txt")
        if not name or name[2]:
            return
        run = attempt(Run, file)
        found = []
        whole = attempt(lambda: found.extend(run.checks(self.track)) or True)
        found.append((whole, "is not the whole log.txt of a complete run"))
        for holds, text in found:
            self.need(holds, f"logs/{file.name}: {text}")
        if run:
            self.runs[name[1]].append(run)

    def compare(self, records):
        """What must agree between the runs; `result`, all that they say. `records` hold the row
        that this one beats."""
        new = sorted(self.runs["new"], key=lambda run: run.start)
        old = sorted(self.runs["old"], key=lambda run: run.start)
        self.compare_seeds(new)
        self.compare_seeds(old)
        self.need(all(run.machine == new[0].machine for run in new + old),
                  f"several machines: {', '.join(MACHINE)} differ")
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
            again = any(run.seed == before.seed
                        or (run.losses == before.losses and run.table == before.table)
                        for before in runs[:i])
            self.need(not again, f"{run.name} repeats the run of another log")

    def summarize(self, new):
        """Set result, but for the comparison."""
        first = new[0]
        M = first.plan.members
        epochs = first.config["epochs"]
        k = self.track["reference_members"][str(epochs)]
        capped = None
        if k:
            capped = {"k": k, **summary([run.table[min(k, M)][1] for run in new])}
        self.start = first.start
        self.budget = (self.path.parent.name, epochs)
        self.result = {
            "track": self.path.parent.name,
            "epochs": epochs,
            "members": M,
            "parameters": first.parameters,
            "machine": first.machine,
            "seeds": [run.seed for run in new],
            **summary([run.loss for run in new]),
            "capped_k": capped,
            "comparison": None}

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
        self.need(source == repeated.source or not versions() or committed,
                  f"its old_seed logs have neither the script of {row} nor, like that row, a "
                  "committed one")
        screened = re.search(r"^Screened on seeds: *(none|\d+(?:[ ,]+\d+)*)", self.readme, re.M)
        self.need(screened, "its README.md lacks the line `Screened on seeds: 1, 2, 3` (or none)")
        tried = re.findall(r"\d+", screened[1]) if screened else []
        self.need(not any(str(run.seed) in tried for run in new),
                  "it was screened on seeds that confirm it")
        losses = [run.loss for run in old]
        return {
            "against": row,
            "seeds": [run.seed for run in old],
            **summary(losses),
            **rule(losses, [run.loss for run in new])}

    def may_beat(self, row, rerun):
        """Whether `row` is an earlier one of this track, with the settings that were rerun."""
        if row is self or row.problems or row.track is not self.track or row.date > self.date:
            return False
        return is_rerun(settings(row.runs["new"][0].config), rerun)

    def check_result(self, write):
        """result.json against the logs."""
        path = self.path / "result.json"
        if write and not self.problems:
            path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
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
    capped = result["capped_k"]
    against = result["comparison"]
    return [
        rank,
        f"{result['mean']:.4f} {evidence(record, records)}",
        f"{capped['mean']:.4f}" if capped else "-",
        result["members"],
        result["epochs"],
        record.date,
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
                rows.append((p["loss"], ["-", p["loss"], "-", "-", p["epochs"], "-", what, "-"]))
            mine = [r for r in records if r.budget == (name, int(epochs))]
            mine.sort(key=lambda record: record.result["mean"])
            for rank, record in enumerate(mine, 1):
                rows.append((record.result["mean"], row_of(record, rank, records)))
            if not rows:
                continue
            rows.sort(key=lambda row: row[0])
            lines = [f"| {' | '.join(map(str, cells))} |" for _, cells in rows]
            head = (f"| rank | loss | at most {k or '?'} members | members | epochs | date | row "
                    "| against |")
            out += [f"### {name}, {epochs} epochs", "", head, "|---" * 8 + "|", *lines, ""]
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", type=lambda f: Path(f).resolve())
    parser.add_argument("--source", metavar="LOG", type=Path)
    parser.add_argument("--write-result", action="store_true")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args(argv)
    if args.source:
        print(read_log(args.source).source, end="")
        return 0
    tracks = json.loads((RECORDS / "tracks.json").read_text(encoding="utf-8"))
    committed = [folder for track in tracks for folder in RECORDS.glob(f"{track}/*")]
    records = [Record(folder, tracks) for folder in sorted({*args.folders, *committed})]
    for record in records:
        if not record.problems:
            record.compare(records)
            record.check_result(args.write_result and record.path in args.folders)
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
    print(f"{len(shown)} folders, {bad} problems")
    return int(bad > 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main())
