"""The checker of records on real runs of seconds, what it must catch, and how one is submitted."""
import json
import lzma
import os
import re
import shutil
import subprocess
import time
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
from pytest import approx
from scipy.stats import t as students_t
from tiny import MINI, ROOT, edit_json, fails, read_json, run_in, user

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
FIRST = range(5)  # seeds of the row to beat
SEEDS = range(5, 10)  # and of both sides of the row that beats it


def submit(records, name, new=(), old=(), track="made"):
    """A folder with logs and predictions of runs; returns it."""
    folder = records / track / f"{TODAY}_{name}"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_text("Why it helps.\n\nScreened on seeds: 90\n")
    for side, runs in (("new", new), ("old", old)):
        for run in runs:
            seed = run.name.lstrip("firstoldnew")
            for suffix in (".txt", ".xz"):
                shutil.copy(run / f"log{suffix}", folder / f"logs/{side}_seed{seed}{suffix}")
    return folder


def says(capsys, *argv):
    """(exit status, output) of the checker."""
    capsys.readouterr()
    status = check.main([str(a) for a in argv])
    return status, capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """{"first", "old" or "new": five folders}, made in turn: an ensemble of 2, and q0 with 2 x 2
    members."""
    logs = tmp_path_factory.mktemp("logs")
    plans = [("first", OLD, seed) for seed in FIRST]
    for seed in SEEDS:
        plans += [("old", OLD, seed), ("new", NEW, seed)]
    found = {"first": [], "old": [], "new": []}
    for side, flags, seed in plans:
        run = logs / f"{side}{seed}"
        run_in(logs, *MINE, "--data", corpus, *flags, "--seed", seed, "--run", run.name)
        recompute.pack(run, run / "log.xz")
        found[side].append(run)
    return found


def tokens_of(corpus):
    """{split: tokens that are predicted}, of one epoch of training text."""
    tokens = {split: corpus.eval_sequences(split)[:, 1:].size for split in ("heldout", "val")}
    return {"train": corpus.train_sequences * corpus.seq_len, **tokens}


def make_records(folder, corpus):
    """A track without rows."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"before\n{check.BEGIN}{check.END}after\n")
    found = q.load_corpus(corpus, LIMITS["seq_len"], LIMITS["train_tokens"])
    track = {"data": found.hashes, "tokens": tokens_of(found), **LIMITS}
    (folder / "tracks.json").write_text(json.dumps({"made": track}))
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


# Good records -----------------------------------------------------------------------------------

def losses(runs, pattern):
    """Numbers of the logs' last lines that match."""
    found = [re.findall(pattern, (run / "log.txt").read_text(), re.M)[-1] for run in runs]
    return [float(number) for number in found]


FINAL = r"^final_val_loss:(\S+)"
CAPPED = r"^ +1 +\S+ +(\S+) "  # of one member, in the table's column `learned`


def test_result_of_a_good_record(good, runs, capsys):
    status, out = says(capsys, good)
    assert status == 0 and "problem:" not in out
    result = read_json(good / "result.json")
    new, old = (losses(runs[side], FINAL) for side in ("new", "old"))
    assert (result["val_loss"], result["seeds"]) == (new, list(SEEDS))
    assert result["mean"] == approx(np.mean(new), abs=1e-6)
    assert (result["members"], result["epochs"]) == (4, 8)
    capped = result["capped_k"]
    assert (capped["k"], capped["val_loss"]) == (1, losses(runs["new"], CAPPED))
    against = result["comparison"]
    assert (against["against"], against["df"]) == (f"{TODAY}_Ensemble", 8)
    s = ((np.var(new) + np.var(old)) * 5 / 8) ** 0.5
    required = students_t.ppf(0.99, 8) * s * (2 / 5) ** 0.5
    assert against["required"] == approx(required, rel=1e-4)
    assert against["difference"] == approx(np.mean(old) - np.mean(new), abs=1e-6)
    assert against["difference"] > against["required"] and against["met"] is True


def test_tables(records, good, runs, capsys):
    status, out = says(capsys)
    assert status == 1 and "tables are not current" in out
    assert says(capsys, "--tables")[0] == says(capsys)[0] == 0
    page = (records / "README.md").read_text()
    assert page.startswith("before\n") and page.endswith(check.END + "after\n")
    new, old = (np.mean(losses(runs[side], FINAL)) for side in ("new", "first"))
    capped = np.mean(losses(runs["new"], CAPPED))
    row = f"| 1 | {new:.4f} (n=5) ✓ | {capped:.4f} | 4 | 8 | {TODAY} | with "
    assert f"{row}| [Q0](made/{TODAY}_Q0) | Ensemble |" in page
    assert f"| 2 | {old:.4f} (n=5) first |" in page
    (records / "README.md").write_text(page.replace("(n=5) ✓", "(n=9) ✓"))
    assert says(capsys)[0] == 1
    # it stays the first one where what beats it began before it, run in turn
    in_log(r'"time": "[^"]*"', '"time": "2000-01-01T00:00:00"', "new_seed5")(good)
    assert says(capsys, good, "--write-result")[0] == says(capsys, "--tables")[0] == 0
    assert "(n=5) first | " in (records / "README.md").read_text()


def test_rule_not_met(records, good, runs, capsys):
    """A row that is no better, and one of a single seed, stand with the mark."""
    shutil.rmtree(good)
    for name, new, old, evidence in (
            ("Equal", runs["old"], runs["old"], "(n=5) Ⓧ"),
            ("Few", runs["new"][:1], [], "(n=1) Ⓧ")):
        folder = submit(records, name, new, old)
        status, out = says(capsys, folder, "--write-result")
        assert status == 0 and evidence in out, out
        shutil.rmtree(folder)


def test_rule():
    noise = [-0.01, 0.01, -0.005, 0.005, 0, 0]  # deviation ~0.008: ~0.0145 is asked for
    for n_old, n_new, gap, met in (
            (5, 5, 0.02, True), (5, 5, 0.01, False), (4, 5, 0.02, False), (5, 4, 0.02, False)):
        old = [4 + x for x in noise[:n_old]]
        new = [4 - gap + x for x in noise[:n_new]]
        assert check.rule(old, new)["met"] is met
    for df in (1, 2, 8, 60):
        for p in (0.9, 0.99):
            assert check.t_quantile(p, df) == approx(students_t.ppf(p, df), rel=1e-5)


# Members that count -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def counted_runs(runs, tmp_path_factory):
    """{"first", "old" or "new": counted run} of runs that were called as their logs will be."""
    trained = tmp_path_factory.mktemp("trained")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q, "LOGS", tmp_path_factory.mktemp("counted"))
        for side, run, name in (("first", runs["first"][4], "new_seed4"),
                                ("new", runs["new"][0], "new_seed5"),
                                ("old", runs["old"][0], "old_seed5")):
            assert q.main(["count", str(shutil.copytree(run, trained / name))]) == 0
            found[side] = q.LOGS / f"{name}_counted"
    return found


@pytest.fixture(scope="module")
def made_counted(made, counted_runs, corpus, tmp_path_factory):
    """Like `made`, and a track whose rows are counted: a run of q0 against one of the ensemble."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("made") / "records")
    limits = {"like": "made", "counted": counting.SETTINGS, "first_seed": 4}
    edit_json(folder / "tracks.json", counted=limits)
    first, row = (submit(folder, name, track="counted") for name in ("Ensemble", "Q0"))
    with pytest.MonkeyPatch.context() as patch:
        see(patch, folder)
        patch.setattr(recompute, "DATA", corpus)
        assert check.main([str(first), "--pack", str(counted_runs["first"])]) == 0
        both = [str(counted_runs[side]) for side in ("new", "old")]
        assert check.main([str(row), "--pack", *both]) == 0
        assert check.main([str(first), str(row), "--write-result"]) == 0
    return folder


@pytest.fixture
def counted(made_counted, corpus, tmp_path, monkeypatch):
    """A copy of q0's row."""
    folder = shutil.copytree(made_counted, tmp_path / "records")
    see(monkeypatch, folder)
    monkeypatch.setattr(recompute, "DATA", corpus)
    return folder / f"counted/{TODAY}_Q0"


def test_counted_row(counted, counted_runs, capsys):
    """Its loss is that with members that count, on both sides; the loss without stands beside."""
    result = read_json(counted / "result.json")
    made = {side: read_json(run / "result.json") for side, run in counted_runs.items()}
    losses = [result[key]["val_loss"] for key in ("neural", "comparison")]
    wanted = [made["new"]["loss_before"], made["old"]["final_val_loss"]]
    assert np.ravel(losses) == approx(wanted, abs=1e-5)
    loss, = result["val_loss"]
    assert loss == approx(made["new"]["final_val_loss"], abs=1e-5)
    assert says(capsys, "--tables")[0] == 0
    page = (counted.parents[1] / "README.md").read_text()
    assert "### counted, 8 epochs\n\n| rank | loss | without counting |" in page
    assert f"| {loss:.4f} (n=1) Ⓧ | {wanted[0]:.4f} | 4 | 8 |" in page


def of_counting(**changes):
    return lambda folder: edit_json(folder / "logs/new_seed5.json", **changes)


COUNTED = {
    "loss": (of_counting(val_loss=3.9), "disagree: members that count gain another amount"),
    "NaN": (of_counting(val_loss=float("nan")), "no loss or no strength"),
    "strength": (of_counting(strength=0), "no loss or no strength"),
    "file": (lambda folder: (folder / "logs/new_seed5.json").unlink(), "are missing or damaged"),
    "settings": (lambda folder: edit_json(folder.parents[1] / "tracks.json", counted={
        "like": "made", "counted": {}}), "has other settings than its track")}


@pytest.mark.parametrize("case", COUNTED)
def test_tampering_with_counts(case, counted, capsys):
    change, message = COUNTED[case]
    change(counted)
    status, out = says(capsys, counted)
    assert status == 1 and re.search(f"problem: logs/new_seed5.*{message}", out), out


def test_counted_without_the_text(counted, tmp_path, monkeypatch, capsys):
    """As in a fresh clone: what counting gains is taken as it is written, and that is said."""
    monkeypatch.setattr(recompute, "DATA", tmp_path)
    of_counting(val_loss=3.9)(counted)
    (counted / "result.json").unlink()
    status, out = says(capsys, counted, "--write-result")
    assert status == 0 and "notice: data/wiki is not here" in out


# What the checker must catch --------------------------------------------------------------------

def in_log(pattern, new, names="new_seed7"):
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
    """Seed 6 again under the name of seed 7, its losses a little higher."""
    for suffix in (".txt", ".xz"):
        shutil.copy(folder / f"logs/new_seed6{suffix}", folder / f"logs/new_seed7{suffix}")
    in_log('"seed": 6,', '"seed": 7,')(folder)
    add_to_losses(0.001)(folder)


def other_seed(folder):
    """10 in place of 9."""
    for path in list((folder / "logs").glob("*_seed9.*")):
        path.rename(path.with_name(path.name.replace("9", "10")))
    in_log('"seed": 9,', '"seed": 10,', "*_seed10")(folder)


def add_to_losses(delta, members=True):
    """Wherever a loss on validation text is printed; without `members`, only where it is of
    several."""
    def change(folder):
        path = folder / "logs/new_seed7.txt"
        head, events = path.read_text().rsplit("=" * 100, 1)
        lines = []
        for line in events.split("\n"):
            alone = line.startswith(("member:", "ensemble members:1 ", "   1 "))
            if members or not alone:
                line = re.sub(r"(?<=val_loss:)\S+|(?<= )\d\.\d{5}(?= |$)",
                              lambda match: f"{float(match[0]) + delta:.5f}", line)
            lines.append(line)
        path.write_text(head + "=" * 100 + "\n".join(lines))
    return change


def in_predictions(change):
    """Another -log p, float16 [members, tokens], in a packed file."""
    def tamper(folder):
        file = folder / "logs/new_seed7.xz"
        raw = np.frombuffer(lzma.decompress(file.read_bytes()), np.uint8)
        values = np.frombuffer(raw.reshape(2, -1).T.tobytes(), np.float16).reshape(4, -1).copy()
        by_byte = np.frombuffer(change(values).tobytes(), np.uint8).reshape(-1, 2).T
        file.write_bytes(lzma.compress(by_byte.tobytes()))
    return tamper


LEARNED = r"^(ensemble members:4 k:4 prior:learned val_loss:)\S+"
LOSS_2 = r"\g<1>2.00000"
IN_A_LOG = [  # (pattern, what replaces its last match, what the checker says)
    # losses
    (LEARNED, r"\g<1>nan", "final_val_loss is not the last learned"),
    (r"^(   4 +\S+ +)\S+", LOSS_2, "final_val_loss is not the table's at k = 4"),
    (r"^(   4 +)\S+", LOSS_2, "k = 4 is not the last uniform"),
    (r"^   1 .*\n", "", "its table lacks a row of k = 1, 4"),
    (r"^(member:0 .*val_loss:)\S+", LOSS_2, "an ensemble of one is not its member"),
    (r"^(member:2 .*val_loss:)\S+", LOSS_2, "mixture of 3 is worse"),
    # lines
    (r"^member:2 .*\n", "", "its 3 member lines are not the 4 planned"),
    (r"^ensemble members:2 .*learned.*\n", "", "ensemble lines do not follow"),
    (r"^(member:3 .*)epochs:8", r"\g<1>epochs:9", "do not end at epoch 8"),
    (r"\d+ tokens in all", "99999 tokens in all", "99999 tokens are more than 8 epochs"),
    (r"^   k [^$]*", "", "is not the whole log.txt"),
    (r'("grad_clip": 1.0),', r"\1, \1,", "is not the whole log.txt"),
    # settings
    (r'("train": \[)([^]]*\],[^$]*"val": \[)([^]]*)\]', r"\1\3, \2\3]",
     "data are not the track's: train"),
    (r'"eot": \d+', '"eot": 1', "data are not the track's: eot"),
    (r"1088 an epoch", "4960 an epoch", "4960 tokens an epoch are not the track's 1088"),
    (r'"epochs": 8', '"epochs": 9', "9 epochs is not a budget"),
    (r'"report": "val"', '"report": "dev"', "reports on dev"),
    (r"^parameters: \d+", "parameters: 30001", "30001 parameters are too many"),
    (r"^steps: 16 (.*), 8192", r"steps: 16 \1, 8191", "its settings make 16 steps, 8192 tokens"),
    (r"^(member:3 .*distilled:)1", r"\g<1>0", "and other members"),
    (r'"teacher": null', '"teacher": "x"', "another run taught it"),
    (r'  "grad_clip": 1.0,\n', "", "its settings are not those of its script: grad_clip"),
    (r'"seed": 7', '"seed": 3', "its seed is 3"),
    (r'"script": "\w', '"script": "x', "did not begin with the script at its head"),
    (r"^(member:0)", r"notice: ... (--allow-edited)\n\1", "its script was edited on the way")]


@pytest.mark.parametrize("pattern, new, message", IN_A_LOG)
def test_a_log_that_contradicts_itself(pattern, new, message, runs, records, tmp_path):
    """Or its track."""
    track = read_json(records / "tracks.json")["made"]
    (tmp_path / "logs").mkdir()
    log = shutil.copy(runs["new"][2] / "log.txt", tmp_path / "logs/new_seed7.txt")
    assert problems_of(log, track) == []
    in_log(pattern, new)(tmp_path)
    assert message in "\n".join(problems_of(log, track))


def problems_of(log, track):
    found = []
    try:
        for holds, text in check.Run(log).checks(track, False):
            found += [] if holds else [text]
    except check.FAULTS:
        found.append("is not the whole log.txt")
    return found


MORE = "differs from new_seed5.txt in more than"
SEVERAL = "several machines"
TAMPERED = {
    "log": (in_log(LEARNED, LOSS_2), "new_seed7.txt: final_val_loss is not the last learned"),
    "no log": (write("logs/new_seed7.txt", "x"), "is not the whole log.txt"),
    "one setting": (in_log(r'"grad_clip": 1.0', '"grad_clip": 0.9'), MORE),
    "one source": (in_source("new_seed7", "# Config", "# Other"), MORE),
    "other row": (in_log('"grad_clip": 1.0', '"grad_clip": 0.9', "old*"), "repeat no earlier row"),
    # seeds, machines, time
    "seed missing": (lambda folder: (folder / "logs/new_seed9.txt").unlink(),
                     "its old and new runs have other seeds"),
    "next seeds": (other_seed, "its seeds must be the next ones, 5 to 9"),
    "processes": (in_log('"processes": 1', '"processes": 2', "old*"), SEVERAL),
    "precision": (in_log('"float32"', '"bfloat16"', "old*"), SEVERAL),
    "before": (in_log(r'"time": "\d+', '"time": "1999', "old*"), "not interleaved in time"),
    "after": (in_log(r'"time": "\d+', '"time": "1999', "new*"), "not interleaved in time"),
    "date": (in_log(r'"time": "\d+', '"time": "3001'), "its date is before its last run"),
    # predictions
    "no predictions": (lambda folder: (folder / "logs/new_seed7.xz").unlink(),
                       "new_seed7: its predictions are missing or damaged"),
    "cut": (in_predictions(lambda x: x[:, 1:]), "predictions are missing or damaged (ValueError"),
    "not probabilities": (in_predictions(lambda x: x * np.nan), "it does not hold -log p"),
    "lower losses": (add_to_losses(-0.02), "new_seed7 and its log disagree: member 0"),
    "lower mixtures": (add_to_losses(-0.02, members=False), "disagree: uniform mixture of 2 mem"),
    "clone": (clone, "repeats the run of another log: new_seed6.txt"),
    # files
    "name of a log": (write("logs/new_seed7_a.txt", "x"), "logs/new_seed7_a.txt is not named"),
    "not counted": (write("logs/new_seed7.json", "{}"), "logs/new_seed7.json is not named"),
    "result": (lambda folder: edit_json(folder / "result.json", mean=2.0), "not what the logs say"),
    "no result": (lambda folder: (folder / "result.json").unlink(), "--write-result"),
    "template": (write("README.md", (ROOT / "records/template.md").read_text()), "not filled in"),
    "not screened": (write("README.md", "Why."), "lacks the line `Screened on seeds"),
    "a range": (write("README.md", "Why.\nScreened on seeds: 1-9"), "lacks the line `Screened on"),
    "screened": (write("README.md", "Why.\nScreened on seeds: 3, 7"), "seeds that confirm it")}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_caught(case, good, capsys):
    change, message = TAMPERED[case]
    change(good)
    status, out = says(capsys, good)
    assert status == 1
    assert re.search(f"^made/{good.name}: problem: .*{re.escape(message)}", out, re.M), out
    assert out.count("problem: ") <= 20, out


def test_part_of_the_tokens(records, good, runs, monkeypatch, capsys):
    """Of a split larger than what is packed, losses are known but for chance."""
    monkeypatch.setattr(recompute, "PACKED", 2000)
    logged = {(run / "log.txt").read_text(): run for side in runs.values() for run in side}
    for path in records.glob("made/*/logs/*.txt"):
        recompute.pack(logged[path.read_text()], path.with_suffix(".xz"))
    assert says(capsys, good)[0] == 0
    log = good / "logs/new_seed7.txt"
    honest = log.read_text()
    for change, message in (
            (add_to_losses(-0.05, members=False), "disagree: uniform mixture of 2"),
            (add_to_losses(-0.04), "new_seed7.txt: its loss is 0.0[34]")):
        change(good)
        status, out = says(capsys, good)
        assert status == 1 and re.search(f"problem: .*{message}", out), out
        log.write_text(honest)
    track = read_json(records / "tracks.json")["made"]
    sides = []
    for side in ("new", "old"):
        logs = sorted(good.glob(f"logs/{side}*.txt"))
        sides.append([recompute.Packed(check.Run(path), track) for path in logs])
    for packed in sides[0]:
        packed.score -= 0.1
    allowed, found = recompute.apart(*sides)
    assert allowed < 0.05 < found


HOSTILE = {  # of a log each; the others' problems are told all the same
    "new_seed5": in_log(r"^step:16/16.*", "ab1:" * 12_500 + "x" * 50_000, "new_seed5"),
    "new_seed9": in_log(
        r'"cycles": 2,([^$]*)^(population: 2 traj.*) x 2 cycles = 4',
        r'"cycles": 5000000,\1\2 x 5000000 cycles = 10000000', "new_seed9"),
    "old_seed6": write("logs/old_seed6.txt", "=" * 11_000_000),
    "old_seed7": lambda folder: (folder / "logs/old_seed7.txt").write_bytes(b"\xff" * 100),
    "old_seed8": lambda folder: (folder / "logs/old_seed8.xz").write_bytes(
        lzma.compress(bytes(50_000_000), preset=0))}
ODD = {
    "link": lambda folder: (folder / "logs/new_seed17.txt").symlink_to("/dev/zero"),
    "pipe": lambda folder: os.mkfifo(folder / "logs/new_seed17.txt"),
    "spaces": write("README.md", "Screened on seeds:" + " " * 100_000 + "x")}


def checked_in_seconds(capsys):
    """The problems of Q0, told in seconds without a traceback; the other row is checked."""
    tracemalloc.start()
    started = time.process_time()
    status, out = says(capsys)
    spent = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == 1 and spent < 20 and peak < 300e6, (spent, peak)
    assert f"made/{TODAY}_Ensemble: problem" not in out and "(n=5) first" in out
    return "\n".join(re.findall(f"^made/{TODAY}_Q0: problem: (.*)", out, re.M))


def test_hostile_logs(records, good, capsys):
    for damage in HOSTILE.values():
        damage(good)
    problems = checked_in_seconds(capsys)
    for name in HOSTILE:
        assert f"logs/{name}" in problems, problems


@pytest.mark.parametrize("case", ODD)
def test_odd_files(case, records, good, capsys):
    ODD[case](good)
    assert checked_in_seconds(capsys)


def test_no_log(tmp_path, capsys):
    """--source and compare say in one line that a file is no log."""
    log = tmp_path / "log.txt"
    log.write_text("x\n" + ("=" * 100 + "\n{}\n"))
    fails(capsys, "log.txt, which should be the log of a run, is .*damaged", "compare", f"a={log}")
    with pytest.raises(SystemExit, match="^check.py: error: .*not the log.txt of a run"):
        check.main(["--source", str(log)])


# Edited source ----------------------------------------------------------------------------------

COMMITTED = {"print(1)\n": "aaa", q.SOURCE: "abc1234", q.SOURCE + "# later\n# and more\n": "bbb"}


def test_edited_source(good, capsys, monkeypatch):
    """Allowed, and shown against the nearest commit; --source prints it. Reruns need the script of
    the row that they repeat, or a committed one; without a history, as of a shallow clone, nothing
    can be checked."""
    monkeypatch.setattr(check, "versions", lambda: COMMITTED)
    of = "train_q0.py of commit abc1234"
    status, out = says(capsys, good)
    assert status == 0 and f"new: {of}\n" in out
    in_source("new*", "# Config:", "# Knobs:")(good)
    status, out = says(capsys, good)
    assert status == 0
    assert f"new: {of}, 2 lines edited" in out and f"old: {of}\n" in out
    assert "\n+# Knobs:" in out and "\n-# Config:" in out
    assert "\n+# Knobs:" not in says(capsys)[1]  # the diff is for those who name the folder
    _, out = says(capsys, "--source", good / "logs/new_seed5.txt")
    assert out == q.SOURCE.replace("# Config:", "# Knobs:")
    in_source("old*", "# Config:", "# Weaker:")(good)
    assert "neither the script of" in says(capsys, good)[1]
    monkeypatch.setattr(check, "versions", lambda: {})
    assert "problem: no git history here" in says(capsys, good)[1]


# The repository's own ---------------------------------------------------------------------------

def test_committed_records(capsys):
    """The real folders and tables."""
    assert check.RECORDS == ROOT / "records"
    status, out = says(capsys)
    assert status == 0, out


@pytest.mark.parametrize("name", ["wiki_cpu", "wiki_13m"])
def test_tracks(name):
    """The default run is of the default track, what records/README.md runs is of the other."""
    tracks = check.read_tracks()
    track = tracks[name]
    assert tracks[f"{name}_counted"]["counted"] == counting.SETTINGS
    page = (ROOT / "records/README.md").read_text(encoding="utf-8")
    size, = re.findall('size="(.*)"', page)
    cfg, *_ = q.parse_config(size.split() if name == "wiki_13m" else ["--preset", "tiny"])
    assert (cfg.train_tokens, cfg.seq_len) == (track["train_tokens"], track["seq_len"])
    most = track["max_parameters"]
    assert 0.9 * most < recompute.parameters(cfg, track["vocab_size"]) <= most
    if (ROOT / "data/wiki/manifest.json").exists():
        found = q.load_corpus(ROOT / "data/wiki", track["seq_len"], track["train_tokens"])
        known = (track["data"], track["tokens"], track["vocab_size"])
        assert known == (found.hashes, tokens_of(found), found.vocab_size)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_logs_of_records_are_committed():
    log = "records/wiki_cpu/2026-11-25_X/logs/new_seed5.txt"
    assert subprocess.run(["git", "check-ignore", log], cwd=ROOT).returncode == 1


def test_settings_of_earlier_scripts():
    """A row can be rerun with today's script: decay said in another way, and off what that script
    did not have."""
    before = {"weight_decay": 0.077, "wd_floor": 12.5, "layers": 4}
    now = {"weight_decay": 0.8, "wd_start": 1.2, "wd_end": 0.096, "layers": 4, "smear": False,
           "induction": False, "average": 0.0}
    row = check.settings({**now, "softcap": 15.0})
    assert check.settings(before) == check.settings(now)
    for name, value in (("induction", True), ("average", 0.25), ("layers", 5), ("wd_end", 1.0)):
        assert check.settings(before) != check.settings({**now, name: value})
    assert check.is_rerun(row, {**row, "seed": 7})
    assert not check.is_rerun(row, check.settings(now))  # a setting that the row had is not said


def test_rows_can_be_rerun():
    """Today's script has the settings of every row, or ELSEWHERE has their values."""
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
            (r"136 137 138 139 140", "5")):
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
    assert check.main([str(first), "--write-result"]) == 0
    (tmp_path / "matplotlib.py").write_text("raise ImportError")  # a curve takes longer
    done = user(copy, "bash", "-ec", submission(corpus), EDITOR="sed -i s/TODO/none/",
                PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problem:" not in done.stdout
    page = (records / "README.md").read_text(encoding="utf-8")
    row, = re.findall(r"^.*MoreNoise\]\(made/.*$", page, re.M)
    assert "(n=1) Ⓧ" in row and "| Ensemble |" in row
