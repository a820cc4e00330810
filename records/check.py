"""Check the folders of records from their logs alone, and rebuild the tables in records/README.md.

    python records/check.py                        every folder, and whether the tables are current
    python records/check.py FOLDER ...             these folders, with the diff of their source to the nearest commit
    python records/check.py FOLDER --write-result  write FOLDER/result.json from the logs first
    python records/check.py --tables               rebuild the tables
    python records/check.py --source LOG           print the script that wrote a log, to run a row again

Rules and tables: records/README.md. Exit status 1 and a line per problem. Standard library alone, no network.
"""
import argparse, ast, collections, datetime, difflib, functools, json, math, re, shutil, statistics, subprocess, sys
from pathlib import Path

RECORDS = Path(__file__).resolve().parent
SEEDS, LEVEL = 5, 0.99  # of the rule
PRINTED = 1.1e-5  # logs show losses with five decimals: the most by which two that are equal can differ
MACHINE = ("cpu", "threads", "torch", "gpu")  # what makes two runs comparable
# settings in which a rerun may differ from the row it repeats: the seed, and those of the machine
FREE = {"seed", "data", "precision", "device", "compile", "graphs", "recompute", "attention",
        "log_every", "save_minutes", "keep_members", "hang_minutes", "skip_nonfinite"}
BEGIN, END = "<!-- tables: made by records/check.py --tables -->\n", "<!-- end of tables -->\n"

# The rule ------------------------------------------------------------------------------------------------------------

def t_quantile(p, df):
    """Quantile (p > 1/2) of Student's t: with t = sqrt(df) tan(a) its density is cos(a)^(df - 1), up to a factor."""
    area = lambda a: a / 1000 * sum(math.cos(a * (i + 0.5) / 1000) ** (df - 1) for i in range(1000))
    low, high, wanted = 0.0, math.pi / 2, (2 * p - 1) * area(math.pi / 2)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if area(middle) < wanted else (low, middle)
    return math.sqrt(df) * math.tan(high)

def rule(old, new):
    """old - new >= t(0.99, df) * s * sqrt(1/n_old + 1/n_new), s the pooled standard deviation, 5 seeds or more each."""
    df, difference = len(old) + len(new) - 2, statistics.mean(old) - statistics.mean(new)
    squares = sum((x - statistics.mean(side)) ** 2 for side in (old, new) for x in side)
    t, s = (t_quantile(LEVEL, df), math.sqrt(squares / df)) if df else (math.inf, math.nan)
    required = t * s * math.sqrt(1 / len(old) + 1 / len(new))
    met = min(len(old), len(new)) >= SEEDS and difference >= required
    numbers = {"t": t, "pooled_std": s, "required": required} if df else {}
    return {"met": met, "df": df, **{k: round(x, 7) for k, x in {"difference": difference, **numbers}.items()}}

# One run: its log, and what must agree in it -------------------------------------------------------------------------

parse_python = functools.lru_cache(ast.parse)  # once for all seeds

def settings(config):
    """Settings in the terms of today's script: earlier ones had no induction heads, no smear and no average, and said by how
    much decay starts above its end. Decay in two digits, so that a row can be rerun in either way of saying it."""
    w, rest = config["weight_decay"], {k: v for k, v in config.items() if k[:3] != "wd_" and k != "weight_decay"}
    ends = (w * config["wd_floor"], w) if "wd_floor" in config else (w * config["wd_start"], w * config["wd_end"])
    return {"smear": False, "induction": False, "average": 0.0, **rest, "decay": [f"{x:.2g}" for x in ends]}

def read_log(path):
    """(source, about, derived settings, event lines) of a log.txt."""
    source, header, events = path.read_text(encoding="utf-8").rsplit("=" * 100 + "\n", 2)  # source may hold such lines
    about, end = json.JSONDecoder().raw_decode(header)
    return source, about, header[end:], events.splitlines()

def group(lines):
    """{first key: [{key: value}, ...]} of event lines."""
    events = [dict(re.findall(r"([\w/]+):(\S+)", line)) for line in lines]
    kinds = ("step", "member", "members", "final_val_loss")  # `members` begins an ensemble's line
    return {kind: [pairs for pairs in events if next(iter(pairs), "") == kind] for kind in kinds}

def attempt(make, *args):
    """What `make` returns, or None where a file is missing or not what it should be."""
    try:
        return make(*args)
    except (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError, OSError):
        return None

class Run:
    """A log. Trajectories with processes of their own add NAME_trajectory<J>.txt."""
    def __init__(self, path):
        self.name, self.seed = path.name, int(re.search(r"_seed(\d+)", path.name)[1])
        self.source, about, header, lines = read_log(path)
        parse_python(self.source)
        self.config, self.machine = about["config"], {x: about["machine"][x] for x in MACHINE}
        self.data = {k: v for k, v in about["data"].items() if k != "name"}
        self.start = datetime.datetime.fromisoformat(about["time"]).replace(tzinfo=None)
        numbers = lambda pattern: [int(x) for x in re.search(pattern, header).groups()]
        self.plan = numbers(r"population: (\d+) trajectories x (\d+) cycles = (\d+) members, (\d+) epochs")
        self.steps, self.tokens, self.epoch_tokens = numbers(r"steps: (\d+) of .* (\d+) tokens in all, (\d+) an epoch")
        self.parameters, = numbers(r"parameters: (\d+);")
        rows = filter(None, (re.fullmatch(r" *(\d+)" + r" +(\d+\.\d+)" * 3, line) for line in lines))
        self.table = {int(row[1]): [float(x) for x in row.groups()[1:]] for row in rows}
        self.best = int(re.search(r"\nprior gap:\S+  weights \(member:weight\) (\d+):", "\n".join(lines))[1])
        others = [read_log(file) for file in sorted(path.parent.glob(f"{path.stem}_trajectory*.txt"))]
        self.parts = [group(lines), *(group(other[3]) for other in others)]
        self.alike = all((other[0], other[1]["config"]) == (self.source, self.config) for other in others)
        self.final, = self.parts[0]["final_val_loss"]
        self.loss = float(self.final["final_val_loss"])
        self.losses = {int(p["member"]): float(p["val_loss"]) for by in self.parts for p in by["member"]}

    def checks(self, track):
        """(holds, what if not): the track's limits, and each number against every other line that implies it."""
        cfg, (J, C, M, epochs), hashes = self.config, self.plan, track["data"] or {}
        differ = [f for f in {**hashes, **self.data} if hashes.get(f) != self.data.get(f)]
        yield not differ, f"data hashes are not the track's: {', '.join(differ)}"
        yield cfg["seed"] == self.seed, f"its seed is {cfg['seed']}"
        yield str(cfg["epochs"]) in track["reference_members"], f"{cfg['epochs']} epochs is not a budget of the track"
        yield cfg["report"] == "val", f"it reports on {cfg['report']}, not val"
        yield cfg["train_tokens"] == track["train_tokens"], f"--train-tokens must be {track['train_tokens']}"
        yield self.parameters <= (track["max_parameters"] or math.inf), f"{self.parameters} parameters are too many"
        planned = [J, C, epochs, M] == [*(cfg[x] for x in ("trajectories", "cycles", "epochs")), J * C]
        yield planned and self.alike, "its plan, or the log of a trajectory, is not of its configuration"
        slack = M * max(cfg["batch_tokens"], cfg["edge_batch_tokens"])  # a cycle has a whole number of steps
        yield self.tokens <= epochs * self.epoch_tokens + slack, f"{self.tokens} tokens are more than {epochs} epochs"
        same = lambda first, *others: all(abs(x - first) <= PRINTED for x in others)
        members = sorted((p for by in self.parts for p in by["member"]), key=lambda p: int(p["member"]))
        at = [[int(p[x]) for x in ("member", "traj", "cycle")] for p in members]
        yield at == [[i, i // C, i % C + 1] for i in range(M)], f"its {len(at)} member lines are not the {M} planned"
        ends = [int(p["epochs"]) for p in members]
        yield ends == sorted(set(ends)) and ends[-1:] == [epochs], f"its members do not end at epoch {epochs}"
        steps = [[[int(x) for x in p["step"].split("/")] for p in by["step"]] for by in self.parts]
        in_order = all(s == sorted(s) and s[-1][0] == s[-1][1] for s in steps) and sum(s[-1][0] for s in steps)
        yield in_order == self.steps, f"its step lines do not lead to step {self.steps}"
        for by in self.parts:
            own, mixed = [float(p["val_loss"]) for p in by["member"]], by["members"]
            wanted = [(str(n + 1), str(n + 1), prior) for n in range(len(own)) for prior in ("uniform", "learned")]
            if [(p["members"], p["k"], p["prior"]) for p in mixed] != wanted:
                yield False, "its ensemble lines do not follow its member lines"
                return
            uniform, learned = ([float(p["val_loss"]) for p in mixed[i::2]] for i in (0, 1))
            yield same(own[0], uniform[0], learned[0]), "an ensemble of one is not its first member"
            for n in range(1, len(own)):  # -log is convex
                yield (uniform[n] <= (n * uniform[n - 1] + own[n]) / (n + 1) + 2 * PRINTED,
                       f"a uniform mixture of {n + 1} is worse than its parts: one of these losses is wrong")
        rows = {1, min(track["reference_members"].get(str(epochs)) or M, M), M}
        yield rows <= self.table.keys(), f"its table lacks a row of k = {', '.join(map(str, sorted(rows)))}"
        yield same(*self.table[1][:2], self.losses[self.best]), f"its table at k = 1 is not the loss of member {self.best}"
        if len(self.parts) == 1:  # else the last ensemble line is of one trajectory
            yield same(self.table[M][0], uniform[-1]), f"its table at k = {M} is not the last uniform ensemble line"
            yield same(self.loss, learned[-1]), "final_val_loss is not the last learned ensemble line"
        yield same(self.loss, *self.table[M][1:]), f"final_val_loss is not the table's at k = {M}"
        yield [int(self.final[x]) for x in ("members", "k", "epochs")] == [M, M, epochs], "its final line is wrong"

# Source: what was edited ---------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def versions():
    """{text: commit} of every committed train_q0.py; empty without git or its whole history."""
    git = lambda *argv: subprocess.run(["git", *argv], cwd=RECORDS.parent, capture_output=True, encoding="utf-8").stdout
    if not shutil.which("git") or git("rev-parse", "--is-shallow-repository") != "false\n":
        return {}
    commits = git("log", "--diff-filter=AM", "--format=%h", "--", "train_q0.py").split()
    return {git("show", f"{c}:./train_q0.py"): c for c in commits}

def source_lines(source, who, whole):
    """How the script of `who` differs from the nearest committed version."""
    if not versions():
        return f"  {who}: notice: no git history here, so its script is not compared\n"
    lines = lambda text: collections.Counter(text.splitlines())
    text = source if source in versions() else min(versions(), key=lambda text: (
        (lines(text) - lines(source)).total() + (lines(source) - lines(text)).total()))
    of = f"train_q0.py of commit {versions()[text]}"
    diff = list(difflib.unified_diff(*(x.splitlines(True) for x in (text, source)), of, who))
    edited = f", {sum(line[0] in '+-' for line in diff[2:])} lines edited" if diff else ""
    return f"  {who}: {of}{edited}\n{''.join(diff) * whole}"

# One folder ----------------------------------------------------------------------------------------------------------

class Record:
    def __init__(self, path, tracks):
        self.path, self.track, self.problems, self.result = path, tracks.get(path.parent.name), [], None
        self.name, self.runs, self.budget = f"{path.parent.name}/{path.name}", {"new": [], "old": []}, None
        self.date = attempt(datetime.date.fromisoformat, path.name[:10])
        self.readme = attempt(lambda: (path / "README.md").read_text(encoding="utf-8")) or ""
        self.need(self.date and re.fullmatch(r"[\d-]{10}_\w+", path.name), "its name is not <YYYY-MM-DD>_<Name>")
        self.need(self.track and path.parent.parent == RECORDS, "it is not in the folder of a track of tracks.json")
        self.need(self.readme.strip() and "TODO" not in self.readme, "its README.md is missing or not filled in")
        for file in sorted(path.glob("logs/*")) if self.track else []:
            name = re.fullmatch(r"(new|old)_seed\d+(_trajectory\d+)?\.txt", file.name)
            self.need(name, f"logs/{file.name} is not named new_seed<S>.txt or old_seed<S>.txt")
            if name and not name[2]:
                run, found = attempt(Run, file), []
                whole = attempt(lambda: found.extend(run.checks(self.track)) or True)
                for holds, text in [*found, (whole, "is not the whole log.txt of a complete run")]:
                    self.need(holds, f"logs/{file.name}: {text}")
                self.runs[name[1]] += [run] if run else []
        self.need(self.runs["new"], "it has no logs/new_seed<S>.txt")

    def need(self, holds, text):
        if not holds:
            self.problems.append(text)

    def compare(self, records):
        """What must agree between the runs; `result`, all that they say. `records` hold the row that this one beats."""
        new, old = (sorted(self.runs[side], key=lambda r: r.start) for side in ("new", "old"))
        for side in (new, old):
            for i, run in enumerate(side):
                fixed, losses = lambda r: (r.source, {**r.config, "seed": None}), lambda r: (r.losses, r.table)
                self.need(fixed(run) == fixed(side[0]), f"{run.name} differs from {side[0].name} in more than the seed")
                again = any(run.seed == r.seed or losses(run) == losses(r) for r in side[:i])
                self.need(not again, f"{run.name} repeats the run of another log")
        self.need(all(r.machine == new[0].machine for r in new + old), f"several machines: {', '.join(MACHINE)} differ")
        self.need(max(r.start for r in new + old).date() <= self.date, "its date is before its last run")
        mixed = min(len(new), len(old)) < 2 or old[0].start < new[-1].start and new[0].start < old[-1].start
        self.need(mixed, "its old and new runs are not interleaved in time")

        def summary(runs, loss=lambda r: r.loss):
            x = [loss(r) for r in runs]
            return {"val_loss": x, "mean": round(statistics.mean(x), 7),
                    "std": round(statistics.stdev(x), 7) if len(x) > 1 else None}
        M, epochs, track = new[0].plan[2], new[0].config["epochs"], self.path.parent.name
        k, self.budget, self.start = self.track["reference_members"][str(epochs)], (track, epochs), new[0].start
        capped = {"k": k, **summary(new, lambda r: r.table[min(k, M)][1])} if k else None
        self.result = {"track": track, "epochs": epochs, "members": M, "parameters": new[0].parameters,
                       "machine": new[0].machine, "seeds": [r.seed for r in new], **summary(new), "capped_k": capped,
                       "comparison": None}
        if not old:
            return
        near = lambda a, b: all(a[x] == b[x] for x in (a.keys() & b.keys()) - FREE)  # a later version adds settings
        rerun = settings(old[0].config)
        rows = [(r.runs["new"][0].source, r.path.name) for r in records if not r.problems and r.track is self.track
                and r is not self and r.date <= self.date and near(settings(r.runs["new"][0].config), rerun)]
        if not rows or old[0].config["epochs"] != epochs:
            return self.need(False, "its old_seed logs repeat no earlier row of this track and budget")
        source, row = min(rows, key=lambda r: (r[0] != old[0].source, r[1]))
        known = source == old[0].source or not versions() or {source, old[0].source} <= versions().keys()
        self.need(known, f"its old_seed logs have neither the script of {row} nor, like that row, a committed one")
        screened = re.search(r"^Screened on seeds: *(none|\d+(?:[ ,]+\d+)*)", self.readme, re.M)
        self.need(screened, "its README.md lacks the line `Screened on seeds: 1, 2, 3` (or none)")
        tried = set(re.findall(r"\d+", screened[1] if screened else ""))
        self.need(tried.isdisjoint(str(r.seed) for r in new), "it was screened on seeds that confirm it")
        self.result["comparison"] = {"against": row, "seeds": [r.seed for r in old], **summary(old),
                                     **rule([r.loss for r in old], [r.loss for r in new])}

def evidence(record, records):
    """✓: the rule is met; Ⓧ: it is not; first: seeds enough, and no earlier row of that budget (but one rerun with it)."""
    n, against = len(record.result["seeds"]), record.result["comparison"]
    against_this = lambda r: (r.result["comparison"] or {}).get("against") == record.path.name
    first = not any(r.start < record.start and not against_this(r) for r in records if r.budget == record.budget)
    return f"(n={n}) " + ("✓" if against and against["met"] else "Ⓧ" if against or n < SEEDS or not first else "first")

# Tables and command line ---------------------------------------------------------------------------------------------

def tables(tracks, records):
    out = []
    for name, track in tracks.items():
        for epochs, k in track["reference_members"].items():
            mine = sorted((r for r in records if r.budget == (name, int(epochs))), key=lambda r: r.result["mean"])
            rows = [(p["loss"], "-", p["loss"], "-", "-", p["epochs"], "-", f"{p['name']} (others' result)", "-")
                    for p in track["published"]]
            rows += [(x["mean"], rank, f"{x['mean']:.4f} {evidence(r, records)}",
                      f"{x['capped_k']['mean']:.4f}" if k else "-", x["members"], epochs, r.date,
                      f"[{r.path.name[11:]}]({r.name})", x["comparison"]["against"][11:] if x["comparison"] else "-")
                     for rank, (r, x) in enumerate(((r, r.result) for r in mine), 1)]
            if not rows:
                continue
            head = f"| rank | loss | at most {k or '?'} members | members | epochs | date | row | against |"
            lines = [f"| {' | '.join(map(str, row[1:]))} |" for row in sorted(rows, key=lambda row: row[0])]
            out += [f"### {name}, {epochs} epochs", "", head, "|---" * 8 + "|", *lines, ""]
    return "\n".join(out) + "\n"

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="*", metavar="FOLDER", type=lambda f: Path(f).resolve())
    p.add_argument("--source", metavar="LOG", type=Path)
    p.add_argument("--write-result", action="store_true")
    p.add_argument("--tables", action="store_true")
    args = p.parse_args(argv)
    if args.source:
        return print(read_log(args.source)[0], end="")
    tracks = json.loads((RECORDS / "tracks.json").read_text(encoding="utf-8"))
    records = [Record(f, tracks) for f in sorted({*args.folders, *(f for t in tracks for f in RECORDS.glob(f"{t}/*"))})]
    for r in (r for r in records if not r.problems):
        r.compare(records)
        if args.write_result and r.path in args.folders and not r.problems:
            (r.path / "result.json").write_text(json.dumps(r.result, indent=1) + "\n", encoding="utf-8")
        stored = attempt(lambda: json.loads((r.path / "result.json").read_text(encoding="utf-8")))
        r.need(stored == r.result, "its result.json is not what the logs say: --write-result makes it")
    for r in (shown := [r for r in records if r.path in args.folders or not args.folders]):
        if r.result:
            print(f"{r.name}: {r.result['mean']:.5f} {evidence(r, records)}", *(
                f"  {key}: {json.dumps(value)}" for key, value in r.result.items()), sep="\n")
            for side, runs in r.runs.items():
                print(source_lines(runs[0].source, side, bool(args.folders)) if runs else "", end="")
        print("".join(f"{r.name}: problem: {text}\n" for text in r.problems), end="")
    bad = sum(len(r.problems) for r in shown)
    if not args.folders:
        print("".join(f"negative/{file.name}\n" for file in sorted(RECORDS.glob("negative/*.md"))), end="")
        text = (RECORDS / "README.md").read_text(encoding="utf-8")
        fresh = text.partition(BEGIN)[0] + BEGIN + "\n" + tables(tracks, records) + END + text.partition(END)[2]
        if args.tables and not bad:
            (RECORDS / "README.md").write_text(text := fresh, encoding="utf-8")
        if text != fresh:
            bad += 1
            print("README.md: problem: its tables are not current: mend any problem above, then --tables rebuilds them")
    print(f"{len(shown)} folders, {bad} problems")
    return int(bad > 0)

if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main())
