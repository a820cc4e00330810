"""The checker of records on real runs of seconds, what it must catch, and how one is submitted."""
import json
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from pytest import approx
from scipy.stats import t as students_t
from tiny import MINI, ROOT, edit_json, read_json, run_in, user

import tiny
import train_q0 as q
from records import check, counting, recompute

TODAY = "2999-01-01"  # a folder's date may not lie before its runs
LIMITS = dict(
    vocab_size=300, train_tokens=1024, seq_len=32, max_parameters=30_000,
    reference_members={"8": 1}, first_seed=0, published=[], without_predictions=[])
OLD = "--population ensemble --trajectories 2 --lr-head 0.03 --lr-matrix 0.04".split()
MINE = [*MINI, "--train-tokens", "1024"]  # an epoch of 1088, two batches of 512
NEW = "--trajectories 2 --cycles 2 --lr-head 0.06 --lr-matrix 0.04".split()
SEEDS = range(1, 6)  # of both sides of the row that beats the first, whose seed is 0


def submit(records, name, new=(), old=(), track="made"):
    """A folder with logs and predictions of runs; returns it."""
    folder = records / track / f"{TODAY}_{name}"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_text("Why it helps.\n\nScreened on seeds: 90\n")
    for side, runs in (("new", new), ("old", old)):
        for run in runs:
            name = f"{side}_seed{run.name[-1]}"
            for suffix in (".txt", ".xz"):
                shutil.copy(run / f"log{suffix}", folder / f"logs/{name}{suffix}")
    return folder


def says(capsys, *argv):
    """(exit status, output) of the checker."""
    capsys.readouterr()
    status = check.main([str(a) for a in argv])
    return status, capsys.readouterr().out


@pytest.fixture(scope="module", autouse=True)
def few_tokens():
    """Fewer are packed than the splits have, as of real tracks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "PACKED", 2000)
        yield


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """{"first", "old" or "new": folders}, made in turn: an ensemble of 2 (one run, then five), and
    q0 with 2 x 2 members (five)."""
    logs = tmp_path_factory.mktemp("logs")
    plans = [("first", OLD, 0)]
    for seed in SEEDS:
        plans += [("old", OLD, seed), ("new", NEW, seed)]
    found = {"first": [], "old": [], "new": []}
    for side, flags, seed in plans:
        run = logs / f"{side}_seed{seed}"
        run_in(logs, *MINE, "--data", corpus, *flags, "--seed", seed, "--run", run.name)
        recompute.pack(run, run / "log.xz")
        found[side].append(run)
    return found


def make_records(folder, corpus):
    """A track without rows, and one that is counted."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"before\n{check.BEGIN}{check.END}after\n")
    found = q.load_corpus(corpus, LIMITS["seq_len"], LIMITS["train_tokens"])
    tokens = {split: found.eval_sequences(split)[:, 1:].size for split in ("heldout", "val")}
    tokens["train"] = found.train_sequences * found.seq_len
    track = {"data": found.hashes, "tokens": tokens, **LIMITS}
    counted = {"like": "made", "counted": counting.SETTINGS}
    (folder / "tracks.json").write_text(json.dumps({"made": track, "counted": counted}))
    return folder


def see(monkeypatch, records):
    """The checker looks at `records`; the script's only version is the one of today."""
    monkeypatch.setattr(check, "RECORDS", records)
    monkeypatch.setattr(check, "versions", lambda: {q.SOURCE: "abc1234"})


@pytest.fixture(scope="module")
def made(corpus, runs, tmp_path_factory):
    """A track with its first row, an ensemble, and q0 against it."""
    folder = make_records(tmp_path_factory.mktemp("made") / "records", corpus)
    rows = [submit(folder, "Ensemble", runs["first"]),
            submit(folder, "Q0", runs["new"], runs["old"])]
    with pytest.MonkeyPatch.context() as patch:
        see(patch, folder)
        assert check.main([*map(str, rows), "--write-result"]) == 0
    return folder


@pytest.fixture
def records(made, tmp_path, monkeypatch):
    """A copy of it."""
    folder = shutil.copytree(made, tmp_path / "records")
    see(monkeypatch, folder)
    return folder


@pytest.fixture
def good(records):
    """q0 against the ensemble."""
    return records / f"made/{TODAY}_Q0"


def test_good_record(records, good, runs, capsys):
    """Its result and its row; the tables must be current."""
    status, out = says(capsys, good)
    assert status == 0 and "problem:" not in out
    result = read_json(good / "result.json")
    new, old = ([read_json(run / "result.json")["final_val_loss"] for run in runs[side]]
                for side in ("new", "old"))
    assert result["val_loss"] == approx(new, abs=1e-5) and result["seeds"] == list(SEEDS)
    assert result["mean"] == approx(np.mean(new), abs=1e-5)
    assert (result["members"], result["epochs"]) == (4, 8)
    capped = result["capped_k"]
    assert capped["k"] == 1 and capped["mean"] > result["mean"]
    against = result["comparison"]
    assert (against["against"], against["df"]) == (f"{TODAY}_Ensemble", 8)
    s = ((np.var(new) + np.var(old)) * 5 / 8) ** 0.5
    required = students_t.ppf(0.99, 8) * s * (2 / 5) ** 0.5
    assert against["required"] == approx(required, abs=1e-5)
    assert against["difference"] == approx(np.mean(old) - np.mean(new), abs=1e-5)
    assert against["difference"] > against["required"] and against["met"] is True
    status, out = says(capsys)
    assert status == 1 and "tables are not current" in out
    assert says(capsys, "--tables")[0] == 0
    page = (records / "README.md").read_text()
    assert page.startswith("before\n") and page.endswith(check.END + "after\n")
    row = f"| 1 | {np.mean(new):.4f} (n=5) ✓ | {capped['mean']:.4f} | 4 | 8 | {TODAY} | with "
    assert f"{row}| [Q0](made/{TODAY}_Q0) | Ensemble |" in page
    assert "(n=1) Ⓧ" in page


def test_rule():
    noise = [-0.01, 0.01, -0.005, 0.005, 0, 0]  # deviation ~0.008: ~0.0145 is asked for
    for n_old, n_new, gap, met in (
            (5, 5, 0.02, True), (5, 5, 0.01, False), (4, 5, 0.02, False), (5, 4, 0.02, False)):
        old = [4 + x for x in noise[:n_old]]
        new = [4 - gap + x for x in noise[:n_new]]
        assert check.rule(old, new)["met"] is met


def test_counted_rows(records, runs, corpus, tmp_path, monkeypatch, capsys):
    """Their loss is that with members that count; the loss without stands beside. Where the text
    is, it is made again."""
    monkeypatch.setattr(recompute, "DATA", corpus)
    monkeypatch.setattr(q, "LOGS", tmp_path / "logs")
    made = []
    for side, name in (("first", "Ensemble"), ("new", "Q0")):
        folder = submit(records, name, track="counted")
        run = shutil.copytree(runs[side][0], q.LOGS / f"new_seed{len(made)}")
        assert q.main(["count", str(run)]) == 0
        counted = q.LOGS / f"{run.name}_counted"
        made.append(read_json(counted / "result.json"))
        assert check.main([str(folder), "--pack", str(counted)]) == 0
    first = folder.with_name(f"{TODAY}_Ensemble")
    assert says(capsys, first, folder, "--write-result")[0] == 0
    result = read_json(folder / "result.json")
    loss, = result["val_loss"]
    neural, = result["neural"]["val_loss"]
    wanted = (made[1]["final_val_loss"], made[1]["loss_before"])
    assert (loss, neural) == approx(wanted, abs=1e-5)
    says(capsys, "--tables")
    page = (records / "README.md").read_text()
    assert f"| {loss:.4f} (n=1) Ⓧ | {neural:.4f} | 4 | 8 |" in page
    edit_json(folder / "logs/new_seed1.json", val_loss=3.9)
    assert "disagree: members that count gain another amount" in says(capsys, folder)[1]


def in_log(pattern, new, names="new_seed3"):
    """A kind of tampering: replace the last match of a pattern in all logs whose names match."""
    def change(folder):
        for file in (folder / "logs").glob(f"{names}.txt"):
            text = file.read_text()
            *_, match = re.finditer(pattern, text, re.M)
            file.write_text(text[:match.start()] + match.expand(new) + text[match.end():])
    return change


def in_source(names, old, new):
    """In the scripts of all whose names match, as if these had run."""
    def change(folder):
        for path in (folder / "logs").glob(f"{names}.txt"):
            source, header, events = path.read_text().rsplit("=" * 100 + "\n", 2)
            edited = source.replace(old, new)
            header = header.replace(q.digest(source), q.digest(edited))
            path.write_text(("=" * 100 + "\n").join((edited, header, events)))
    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def clone(folder):
    """Seed 2 again under the name of seed 3, its losses a little higher."""
    for suffix in (".txt", ".xz"):
        shutil.copy(folder / f"logs/new_seed2{suffix}", folder / f"logs/new_seed3{suffix}")
    in_log('"seed": 2,', '"seed": 3,')(folder)
    add_to_losses("new_seed3", 0.001)(folder)


def other_seed(folder):
    """9 in place of 5."""
    for path in list((folder / "logs").glob("new_seed5.*")):
        path.rename(path.with_name(path.name.replace("5", "9")))
    in_log('"seed": 5,', '"seed": 9,', "new_seed9")(folder)


def add_to_losses(name, delta):
    """Wherever a loss on validation text is printed."""
    def more(match):
        return f"{float(match[0]) + delta:.5f}"

    def change(folder):
        path = folder / f"logs/{name}.txt"
        *head, events = path.read_text().rsplit("=" * 100, 1)
        events = re.sub(r"(?<=val_loss:)\S+|(?<= )\d\.\d{5}(?= |$)", more, events, flags=re.M)
        path.write_text(("=" * 100).join([*head, events]))
    return change


LEARNED = r"^(ensemble members:4 k:4 prior:learned val_loss:)\S+"
LOSS_2 = r"\g<1>2.00000"
IN_A_LOG = [  # (pattern, what replaces its last match, what the checker says)
    (LEARNED, r"\g<1>nan", "final_val_loss is not the last learned"),
    (r"^(member:0 .*val_loss:)\S+", LOSS_2, "an ensemble of one is not its member"),
    (r"^(member:2 .*val_loss:)\S+", LOSS_2, "mixture of 3 is worse"),
    (r"^member:2 .*\n", "", "its 3 member lines are not the 4 planned"),
    (r"\d+ tokens in all", "99999 tokens in all", "99999 tokens are more than 8 epochs"),
    (r'("train": \[)([^]]*\],[^$]*"val": \[)([^]]*)\]', r"\1\3, \2\3]",
     "data are not the track's: train"),
    (r'"report": "val"', '"report": "dev"', "reports on dev"),
    (r"^parameters: \d+", "parameters: 30001", "30001 parameters are too many"),
    (r'"teacher": null', '"teacher": "x"', "another run taught it"),
    (r'"seed": \d+', '"seed": 7', "its seed is 7"),
    (r'"script": "\w', '"script": "x', "did not begin with the script at its head"),
    (r"^(member:0)", r"notice: ... (--allow-edited)\n\1", "its script was edited on the way")]
MORE = "differs from new_seed1.txt in more than"
TAMPERED = {  # what is told together: [(change, message), ...]
    "files": [
        (in_log(LEARNED, LOSS_2, "new_seed1"), "new_seed1.txt: final_val_loss is not the last"),
        (write("logs/new_seed2.txt", "x"), "new_seed2.txt: is not the whole log.txt"),
        (lambda folder: (folder / "logs/new_seed3.xz").unlink(), "its predictions are missing"),
        (add_to_losses("old_seed1", -0.1), "old_seed1 and its log disagree: member 0"),
        (write("logs/new_seed7_a.txt", "x"), "logs/new_seed7_a.txt is not named"),
        (write("README.md", (ROOT / "records/template.md").read_text()), "not filled in")],
    "runs": [
        (in_log(r'"grad_clip": 1.0', '"grad_clip": 0.9'), f"new_seed3.txt {MORE}"),
        (in_source("new_seed4", "# Config", "# Other"), f"new_seed4.txt {MORE}"),
        (in_log('"grad_clip": 1.0', '"grad_clip": 0.9', "old*"), "repeat no earlier row"),
        (in_log(r'"time": "\d+', '"time": "1999', "old*"), "not interleaved in time"),
        (in_log(r'"time": "\d+', '"time": "3001'), "its date is before its last run")],
    "seeds": [
        (clone, "repeats the run of another log: new_seed2.txt"),
        (in_log('"float32"', '"bfloat16"', "old*"), "several machines"),
        (in_log(r'"time": "\d+', '"time": "1999', "new*"), "not interleaved in time"),
        (write("README.md", "Why.\nScreened on seeds: 3, 7"), "seeds that confirm it"),
        (lambda folder: (folder / "logs/old_seed4.txt").unlink(), "old and new runs have other")],
    "link": [(lambda folder: (folder / "logs/new_seed6.txt").symlink_to("/dev/zero"), "a link")],
    "loss": [(add_to_losses("new_seed2", -0.04), "new_seed2.txt: its loss is 0.0")],
    "next": [(other_seed, "its seeds must be the next ones, 1 to 5")],
    "result": [(lambda folder: edit_json(folder / "result.json", mean=2.0), "not what the logs")],
    "readme": [(write("README.md", "Why."), "lacks the line `Screened on seeds")]}
for number, (pattern, new, message) in enumerate(IN_A_LOG):  # each in a log of its own
    change = in_log(pattern, new, f"new_seed{number % 5 + 1}")
    TAMPERED.setdefault(f"log {number // 5}", []).append((change, message))


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_caught(case, good, capsys):
    for change, _ in TAMPERED[case]:
        change(good)
    status, out = says(capsys, good)
    assert status == 1
    for _, message in TAMPERED[case]:
        assert re.search(f"^made/{good.name}: problem: .*{re.escape(message)}", out, re.M), out


COMMITTED = {"print(1)\n": "aaa", q.SOURCE: "abc1234", q.SOURCE + "# later\n# and more\n": "bbb"}


def test_edited_source(good, capsys, monkeypatch):
    """Allowed, and shown against the nearest commit; --source prints it. Reruns need the script of
    the row that they repeat, or a committed one."""
    monkeypatch.setattr(check, "versions", lambda: COMMITTED)
    of = "train_q0.py of commit abc1234"
    in_source("new*", "# Config:", "# Knobs:")(good)
    status, out = says(capsys, good)
    assert status == 0
    assert f"new: {of}, 2 lines edited" in out and f"old: {of}\n" in out
    assert "\n+# Knobs:" in out and "\n-# Config:" in out
    _, out = says(capsys, "--source", good / "logs/new_seed5.txt")
    assert out == q.SOURCE.replace("# Config:", "# Knobs:")
    in_source("old*", "# Config:", "# Weaker:")(good)
    assert "neither the script of" in says(capsys, good)[1]


def test_committed_records(capsys, monkeypatch):
    """The real folders and tables."""
    monkeypatch.setattr(recompute, "PACKED", 8192)
    assert check.RECORDS == ROOT / "records"
    status, out = says(capsys)
    assert status == 0, out


def test_rows_can_be_rerun():
    """Today's script has the settings of every row, or ELSEWHERE has their values; the default run
    is of the track."""
    track = check.read_tracks()["wiki_cpu"]
    cfg, *_ = q.parse_config(["--preset", "tiny"])
    assert (cfg.train_tokens, cfg.seq_len) == (track["train_tokens"], track["seq_len"])
    today = check.settings(asdict(q.resolve(q.Config())[0]))
    for row in (ROOT / "records").glob("wiki_cpu/*"):
        log = min(row.glob("logs/new_*.txt"))
        then = check.settings(check.Run(log).config)
        assert then.keys() - check.FREE == today.keys() - check.FREE, row.name


def submission(corpus):
    """The README's block, with smaller settings and a single seed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tag = "<!-- runs in tests/test_records.py, with smaller settings -->"
    block, = re.findall(rf"^{tag}\n```shell\n(.*?)^```", text, re.M | re.S)
    small = " ".join([*MINE, "--data", str(corpus)])
    for pattern, new in (
            (r"old=\(.*?\)", f"old=({small} {' '.join(OLD)})"),
            (r"new=\(.*?\)", f"new=({small} {' '.join(NEW)})"),
            (r"wiki_cpu", "made"),
            (r"150 151 152 153 154", "1")):
        block, count = re.subn(pattern, new, block)
        assert count == 1, pattern
    return block


def test_readme_submit(corpus, runs, tmp_path, monkeypatch):
    """In a clone, with a first row to beat: the new row stands as n=1."""
    copy = tiny.clone(tmp_path / "clone")
    records = make_records(copy / "records", corpus)
    first = submit(records, "Ensemble", runs["first"])
    first = first.rename(first.with_name("2020-01-01_Ensemble"))  # not younger
    in_log(r'"time": "\d+-\d+-\d+', '"time": "2019-01-01', "*")(first)
    for argv in ("init -q", "add train_q0.py", "-c user.name=a -c user.email=a@b commit -qm x"):
        assert user(copy, "git", *argv.split()).returncode == 0
    see(monkeypatch, records)
    monkeypatch.setattr(recompute, "PACKED", 8192)
    recompute.pack(runs["first"][0], first / "logs/new_seed0.xz")
    assert check.main([str(first), "--write-result"]) == 0
    (tmp_path / "matplotlib.py").write_text("raise ImportError")  # a curve takes longer
    done = user(copy, "bash", "-ec", submission(corpus), EDITOR="sed -i s/TODO/none/",
                PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problem:" not in done.stdout
    page = (records / "README.md").read_text(encoding="utf-8")
    row, = re.findall(r"^.*MoreNoise\]\(made/.*$", page, re.M)
    assert "(n=1) Ⓧ" in row and "| Ensemble |" in row
