"""The checker of records on real runs of seconds, what it must catch, and the README's way to submit one. CPU only."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import t as students_t

import train_q0 as q0
from records import plot
from tiny import MINI, clone as copy_repo, user

ROOT = Path(q0.__file__).resolve().parent
sys.path.insert(0, str(ROOT / "records"))
import check  # noqa: E402

TODAY = "2999-01-01"  # a folder's date may not lie before its runs
LIMITS = dict(train_tokens=1000, max_parameters=30_000, reference_members={"8": 1}, published=[])
OLD = "--population ensemble --trajectories 2 --lr-head 0.03 --lr-matrix 0.04".split()
NEW = "--trajectories 2 --cycles 2 --lr-head 0.06 --lr-matrix 0.04".split()  # the prior mixes their last members
SEEDS = range(5)


def submit(records, name, new, old=(), screened="90"):
    """A folder with logs {file name: text} and a result; returns what the checker says."""
    folder = records / "made" / f"{TODAY}_{name}"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_text(f"Why it helps.\n\nScreened on seeds: {screened}\n")
    for side, texts in (("new", new), ("old", old)):
        for seed, text in enumerate(texts):
            (folder / "logs" / f"{side}_seed{seed}.txt").write_text(text)
    return folder


def says(capsys, *argv):
    """(exit status, output) of the checker."""
    capsys.readouterr()
    return check.main([str(a) for a in argv]), capsys.readouterr().out


@pytest.fixture(scope="module")
def logs(corpus, tmp_path_factory):  # noqa: F811
    """{"old" or "new": five logs}, made in turn: an ensemble of 2 and q0 with 2 x 2 members, at 8 epochs."""
    folder, threads, texts = tmp_path_factory.mktemp("logs"), torch.get_num_threads(), {"old": [], "new": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q0, "LOGS", folder)
        patch.setattr(plot, "draw_curve", lambda *args: None)
        torch.set_num_threads(1)
        for seed in SEEDS:
            for side, argv in (("old", OLD), ("new", NEW)):
                name = f"{side}{seed}"
                assert q0.main([*MINI, "--data", str(corpus), *argv, "--seed", str(seed), "--run", name]) == 0
                texts[side].append((folder / name / "log.txt").read_text())
    torch.set_num_threads(threads)
    return texts


def make_records(folder, corpus):  # noqa: F811
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"before\n{check.BEGIN}{check.END}after\n")
    manifest = json.loads((corpus / "manifest.json").read_text())
    hashes = {f["name"]: f["sha256"] for split in manifest["splits"].values() for f in split["files"]}
    (folder / "tracks.json").write_text(json.dumps({"made": {"data": hashes, **LIMITS}}))
    return folder


@pytest.fixture
def records(tmp_path, corpus, logs, monkeypatch):  # noqa: F811
    """A track with its first row, an ensemble; no git history."""
    folder = make_records(tmp_path / "records", corpus)
    monkeypatch.setattr(check, "RECORDS", folder)
    monkeypatch.setattr(check, "versions", lambda: {})
    assert check.main([str(submit(folder, "Ensemble", logs["old"])), "--write-result"]) == 0
    return folder


@pytest.fixture
def good(records, logs):
    """q0 against the ensemble."""
    folder = submit(records, "Q0", logs["new"], logs["old"])
    assert check.main([str(folder), "--write-result"]) == 0
    return folder


def numbers(text):
    """(final loss, learned column at K = 1), read in another way than the checker's."""
    rows = [line.split() for line in text.splitlines()]
    return (float(re.findall(r"^final_val_loss:(\S+)", text, re.M)[-1]),
            next(float(row[2]) for row in rows if len(row) == 4 and row[0] == "1"))


def test_good_record(records, good, logs, capsys):
    status, out = says(capsys, good)
    assert status == 0 and "problem:" not in out and "notice: no git history" in out
    result = json.loads((good / "result.json").read_text())
    new, old = ([numbers(text) for text in logs[side]] for side in ("new", "old"))
    assert result["val_loss"] == [loss for loss, _ in new] and result["seeds"] == list(SEEDS)
    assert result["capped_k"]["val_loss"] == [capped for _, capped in new] and result["capped_k"]["k"] == 1
    assert all(capped > loss for loss, capped in new)
    mean = {side: sum(loss for loss, _ in x) / 5 for side, x in (("new", new), ("old", old))}
    variance = sum((loss - mean[side]) ** 2 for side, x in (("new", new), ("old", old)) for loss, _ in x) / 8
    assert result["mean"] == pytest.approx(mean["new"], abs=1e-6) and result["members"] == 4 and result["epochs"] == 8
    against = result["comparison"]
    assert against["against"] == f"{TODAY}_Ensemble" and against["df"] == 8
    assert against["required"] == pytest.approx(students_t.ppf(0.99, 8) * (variance * 2 / 5) ** 0.5, rel=1e-4)
    assert against["difference"] == pytest.approx(mean["old"] - mean["new"], abs=1e-6)
    assert against["difference"] > against["required"] and against["met"] is True
    status, out = says(capsys)
    assert status == 1 and "tables are not current" in out
    assert says(capsys, "--tables")[0] == 0 and says(capsys)[0] == 0
    page = (records / "README.md").read_text()
    assert page.startswith("before\n") and page.endswith(check.END + "after\n")
    row = (f"| 1 | {mean['new']:.4f} (n=5) ✓ | {sum(c for _, c in new) / 5:.4f} | 4 | 8 | {TODAY} | "
           f"[Q0](made/{TODAY}_Q0) | Ensemble |")
    assert row in page and f"| 2 | {mean['old']:.4f} (n=5) first |" in page
    (records / "README.md").write_text(page.replace("(n=5) ✓", "(n=9) ✓"))
    assert says(capsys)[0] == 1


def test_a_first_row_is_run_in_turn_with_what_beats_it(records, good, capsys):
    """It stays the first one though the other's first run began before it."""
    in_log(r'"time": "[^"]*"', '"time": "2000-01-01T00:00:00"', "new_seed0.txt")(good)
    assert check.main([str(good), "--write-result"]) == 0 and check.main(["--tables"]) == 0
    assert "(n=5) first | " in (records / "README.md").read_text()


def test_rule_not_met(records, logs, capsys):
    """A row that loses, and one of a single seed, stand with the mark."""
    submit(records, "Q0", logs["new"], logs["old"])
    worse, few = submit(records, "Worse", logs["old"], logs["new"]), submit(records, "Few", logs["new"][:1])
    single = submit(records, "Single", logs["new"][1:2], logs["old"][1:2])
    for i, folder in enumerate((single / "logs").iterdir()):  # named by seed
        folder.rename(folder.with_name(folder.name.replace("seed0", "seed1")))
    for folder in records.glob("made/*"):
        status, out = says(capsys, folder, "--write-result")
        assert status == 0, out
        evidence = {"Q0": "(n=5) ✓", "Worse": "(n=5) Ⓧ", "Few": "(n=1) Ⓧ", "Single": "(n=1) Ⓧ"}
        assert evidence.get(folder.name[11:], "(n=5) first") in out
    assert json.loads((worse / "result.json").read_text())["comparison"]["difference"] < 0
    assert json.loads((few / "result.json").read_text())["comparison"] is None
    assert json.loads((single / "result.json").read_text())["comparison"]["met"] is False


@pytest.mark.parametrize("n_old, n_new, gap, met", [(5, 5, 0.02, True), (5, 5, 0.01, False), (4, 5, 0.02, False),
                                                    (5, 4, 0.02, False), (6, 5, -0.02, False)])
def test_rule(n_old, n_new, gap, met):
    noise = [0.01 * x for x in (-1, 1, -0.5, 0.5, 0, 0)]  # standard deviation ~0.008: ~0.0145 is asked for
    assert check.rule([4 + x for x in noise[:n_old]], [4 - gap + x for x in noise[:n_new]])["met"] is met


def test_t_quantile():
    for p in (0.9, 0.99, 0.999):
        for df in (1, 2, 3, 4, 7, 8, 9, 18, 60):
            assert check.t_quantile(p, df) == pytest.approx(students_t.ppf(p, df), rel=1e-5)


def in_log(pattern, new, name="new_seed2.txt"):
    """A kind of tampering: replace the last match of a pattern in a log."""
    def change(folder):
        text = (folder / "logs" / name).read_text()
        match = list(re.finditer(pattern, text, re.M))[-1]
        (folder / "logs" / name).write_text(text[:match.start()] + match.expand(new) + text[match.end():])
    return change


def every_log(pattern, new, names="*"):
    def change(folder):
        for path in (folder / "logs").glob(names):
            in_log(pattern, new, path.name)(folder)
    return change


def drop(name):
    return lambda folder: (folder / name).unlink()


def copy_seed(config):
    def change(folder):
        text = (folder / "logs/new_seed1.txt").read_text()
        (folder / "logs/new_seed2.txt").write_text(text.replace('"seed": 1,', f'"seed": {config},'))
    return change


def in_result(*keys, by=1e-5):
    def change(folder):
        whole = place = json.loads((folder / "result.json").read_text())
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] += by
        (folder / "result.json").write_text(json.dumps(whole))
    return change


def readme(text):
    return lambda folder: (folder / "README.md").write_text(text)


LEARNED = r"^(ensemble members:4 k:4 prior:learned val_loss:)\S+"
TAMPERED = {
    "final loss": (in_log(r"^final_val_loss:\S+", "final_val_loss:2.00000"), "new_seed2.txt: final_val_loss is not"),
    "last ensemble line": (in_log(LEARNED, r"\g<1>2.00000"), "final_val_loss is not the last learned"),
    "loss in the table": (in_log(r"^(   4 +\S+ +)\S+", r"\g<1>2.00000"), "final_val_loss is not the table's at k = 4"),
    "uniform in the table": (in_log(r"^(   4 +)\S+", r"\g<1>2.00000"), "k = 4 is not the last uniform"),
    "first row": (in_log(r"^   1 .*$", "   1   2.00000   2.00000   2.00000"), "k = 1 is not the loss of member"),
    "row missing": (in_log(r"^   1 .*\n", ""), "its table lacks a row of k = 1, 4"),
    "loss not a number": (in_log(LEARNED, r"\g<1>nan"), "final_val_loss is not the last learned"),
    "member's loss": (in_log(r"^(member:0 .*val_loss:)\S+", r"\g<1>2.00000"), "an ensemble of one is not its first"),
    "a later member's loss": (in_log(r"^(member:2 .*val_loss:)\S+", r"\g<1>2.00000"), "mixture of 3 is worse"),
    "member line removed": (in_log(r"^member:2 .*\n", ""), "its 3 member lines are not the 4 planned"),
    "ensemble line removed": (in_log(r"^ensemble members:2 .*learned.*\n", ""), "ensemble lines do not follow"),
    "members end elsewhere": (in_log(r"^(member:3 .*)epochs:8", r"\g<1>epochs:9"), "do not end at epoch 8"),
    "last step": (in_log(r"^step:16/16", "step:15/16"), "do not lead to step 16"),
    "steps planned": (in_log(r"^steps: 16", "steps: 17"), "do not lead to step 17"),
    "more tokens": (in_log(r"\d+ tokens in all", "99999 tokens in all"), "99999 tokens are more than 8 epochs"),
    "plan": (in_log(r"x 2 cycles = 4 members", "x 3 cycles = 6 members"), "its plan"),
    "final members": (in_log(r"members:4 k:4 epochs:8", "members:4 k:3 epochs:8"), "its final line"),
    "cut short": (in_log(r"^final_val_loss[^$]*", ""), "new_seed2.txt: is not the whole log.txt"),
    "no log": (lambda folder: (folder / "logs/new_seed2.txt").write_text("x"), "is not the whole log.txt"),
    "not Python": (in_log(r"^def main\(", "def main(("), "is not the whole log.txt"),
    "data": (in_log(r'"val.bin": "\w', '"val.bin": "x'), "data hashes are not the track's: val.bin"),
    "data of a split missing": (in_log(r',\s+"val.bin": "\w+"', ""), "data hashes are not the track's: val.bin"),
    "epochs": (every_log(r'"epochs": 8', '"epochs": 9'), "9 epochs is not a budget"),
    "dev": (in_log(r'"report": "val"', '"report": "dev"'), "reports on dev"),
    "more text": (in_log(r'"train_tokens": 1000', '"train_tokens": 0'), "--train-tokens must be 1000"),
    "parameters": (in_log(r"^parameters: \d+", "parameters: 30001"), "30001 parameters are too many"),
    "other settings": (in_log(r'"grad_clip": 1.0', '"grad_clip": 0.9'), "differs from new_seed0.txt in more than"),
    "source of one seed": (in_log(r"^# Config", "# Other"), "differs from new_seed0.txt in more than the seed"),
    "file name": (in_log(r'"seed": 2', '"seed": 3'), "its seed is 3"),
    "two equal seeds": (copy_seed(1), "its seed is 1"),
    "a seed twice under two names": (copy_seed(2), "new_seed2.txt repeats the run"),
    "seed missing": (drop("logs/new_seed2.txt"), "result.json is not what the logs say"),
    "other machine": (every_log(r'"cpu": ".*"', '"cpu": "abacus"', "old*"), "several machines"),
    "not interleaved": (every_log(r'"time": "\d+', '"time": "1999', "old*"), "not interleaved in time"),
    "not interleaved, after": (every_log(r'"time": "\d+', '"time": "1999', "new*"), "not interleaved in time"),
    "date": (in_log(r'"time": "\d+', '"time": "3001'), "its date is before its last run"),
    "no such row": (every_log(r'"grad_clip": 1.0', '"grad_clip": 0.9', "old*"), "repeat no earlier row"),
    "other name": (lambda folder: (folder / "logs/new.txt").write_text("x"), "logs/new.txt is not named"),
    "result edited": (in_result("val_loss", 0), "result.json is not what the logs say"),
    "capped edited": (in_result("capped_k", "val_loss", 1), "result.json is not what the logs say"),
    "rule edited": (in_result("comparison", "required", by=-1), "result.json is not what the logs say"),
    "result removed": (drop("result.json"), "--write-result"), "no README": (drop("README.md"), "README.md is missing"),
    "template": (readme((ROOT / "records/template.md").read_text()), "not filled in"),
    "not screened": (readme("Why."), "lacks the line `Screened on seeds"),
    "screened on these": (readme("Why.\nScreened on seeds: 7, 3"), "screened on seeds that confirm it"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_caught(case, good, capsys):
    change, message = TAMPERED[case]
    change(good)
    status, out = says(capsys, good)
    problems = [line for line in out.splitlines() if line.startswith(f"made/{good.name}: problem: ")]
    assert status == 1 and any(message in line for line in problems), out
    assert len(problems) <= 20, out


@pytest.mark.parametrize("name", ["Q0", "2026-13-01_Q0", "2026-11-25"])
def test_folder_name(name, good, capsys):
    status, out = says(capsys, good.rename(good.with_name(name)))
    assert status == 1 and "its name is not <YYYY-MM-DD>_<Name>" in out


def test_edited_source(good, logs, tmp_path, monkeypatch, capsys):
    """Allowed and shown against the nearest commit; --source prints it; reruns need a script of the row or a commit."""
    git = lambda *argv: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *argv], cwd=tmp_path,
                                       check=True, capture_output=True)
    git("init", "-q")
    for text in ("print(1)\n", q0.SOURCE, q0.SOURCE + "# later\n# and more\n", "print(2)\n"):
        (tmp_path / "train_q0.py").write_text(text)
        git("add", "train_q0.py")
        git("commit", "-qm", "x")
    nearest = git("log", "--format=%h", "--skip=2", "-n1").stdout.decode().strip()
    monkeypatch.undo()
    check.versions.cache_clear()
    monkeypatch.setattr(check, "RECORDS", good.parent.parent)
    status, out = says(capsys, good)
    assert status == 0 and f"new: train_q0.py of commit {nearest}\n" in out
    every_log(r"^# Config:", "# Knobs:", "new*")(good)
    status, out = says(capsys, good)
    assert status == 0 and f"new: train_q0.py of commit {nearest}, 2 lines edited" in out
    assert "\n+# Knobs:" in out and "\n-# Config:" in out and f"old: train_q0.py of commit {nearest}\n" in out
    assert "\n+# Knobs:" not in says(capsys)[1]  # the diff is for those who name the folder
    assert says(capsys, "--source", good / "logs/new_seed0.txt")[1] == q0.SOURCE.replace("# Config:", "# Knobs:")
    every_log(r"^# Config:", "# Weaker:", "old*")(good)
    assert "neither the script of" in says(capsys, good)[1]
    check.versions.cache_clear()


def test_side_by_side(records, logs, capsys):
    """Trajectories with processes of their own: each logs its own members, the first one all of the table."""
    folder, halves = records / f"made/{TODAY}_Parallel", []
    for j in (0, 1):
        lines = logs["old"][0].splitlines(True)
        loss = next(re.search(r"val_loss:(\S+)", line)[1] for line in lines if line.startswith(f"member:{j} "))
        lines = [line for line in lines if not re.match(rf"(step|member):.* traj:{1 - j} |ensemble members:2 ", line)]
        half = re.sub(r"^(ensemble members:1 .*val_loss:)[\d.]+", rf"\g<1>{loss}", "".join(lines), flags=re.M)
        halves.append(re.sub(r"^step:(\d+)/16", lambda m: f"step:{int(m[1]) - 8 * j}/8", half, flags=re.M))
    submit(records, "Parallel", halves[:1])
    (folder / "logs/new_seed0_trajectory1.txt").write_text(halves[1][:halves[1].index("\n   k ") + 1])
    status, out = says(capsys, folder, "--write-result")
    assert status == 0, out
    (folder / "logs/new_seed0_trajectory1.txt").unlink()
    assert "its 1 member lines are not the 2 planned" in says(capsys, folder)[1]


def test_committed_records(capsys):
    """The real folders and tables; the log folders must not be ignored by git."""
    assert check.RECORDS == ROOT / "records"
    status, out = says(capsys)
    assert status == 0, out
    tracks = json.loads((ROOT / "records/tracks.json").read_text())
    for epochs, members in tracks["wiki_cpu"]["reference_members"].items():
        assert members == q0.allocate(q0.Config("q0", "ensemble", int(epochs)))[0]
    assert tracks["wiki_cpu"]["train_tokens"] == q0.Config.train_tokens
    manifest = ROOT / "data/wiki/manifest.json"
    if manifest.exists():
        files = [f for s in json.loads(manifest.read_text())["splits"].values() for f in s["files"]]
        assert tracks["wiki_cpu"]["data"] == {f["name"]: f["sha256"] for f in files}
    if (ROOT / ".git").exists() and shutil.which("git"):
        ignored = subprocess.run(["git", "check-ignore", "records/wiki_cpu/2026-11-25_X/logs/new_seed0.txt"], cwd=ROOT)
        assert ignored.returncode == 1


def test_settings_of_earlier_scripts():
    """A row can be rerun with today's script: decay said in another way, and off what that script did not have."""
    before = {"weight_decay": 0.077, "wd_floor": 12.5, "layers": 4}
    now = {"weight_decay": 0.8, "wd_start": 1.2, "wd_end": 0.096, "layers": 4, "smear": False, "induction": False,
           "average": 0.0}
    assert check.settings(before) == check.settings(now)
    for other in ({"induction": True}, {"average": 0.25}, {"layers": 5}, {"wd_end": 1.0}, {"weight_decay": 0.9}):
        assert check.settings(before) != check.settings({**now, **other})



def test_readme_submit(corpus, logs, tmp_path):  # noqa: F811
    """The README's block in a clone, with smaller settings and a single seed: a row that stands as n=1."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block, = re.findall(r"^<!-- runs in tests/test_records.py, with smaller settings -->\n```shell\n(.*?)^```", text,
                        re.M | re.S)
    small = " ".join([*MINI, "--data", str(corpus)])
    for pattern, new in ((r"old=\(.*?\)", f"old=({small} {' '.join(OLD)})"), (r"wiki_cpu", "made"),
                         (r"new=\(.*?\)", f"new=({small} {' '.join(NEW)})"), (r"101 102 103 104 105", "101")):
        block, count = re.subn(pattern, lambda m: new, block)
        assert count == 1, pattern
    clone = copy_repo(tmp_path / "clone")
    make_records(clone / "records", corpus)
    first = submit(clone / "records", "Ensemble", logs["old"])
    first = first.rename(first.with_name("2020-01-01_Ensemble"))  # a row to beat is not younger
    every_log(r'"time": "\d+-\d+-\d+', '"time": "2019-01-01')(first)
    done = user(clone, "python", "records/check.py", first, "--write-result")
    assert done.returncode == 0, done.stdout
    (tmp_path / "matplotlib.py").write_text("raise ImportError")  # a curve takes longer than such a run
    done = user(clone, "bash", "-ec", block, EDITOR="sed -i s/TODO/none/", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problem:" not in done.stdout and "(n=1) Ⓧ" in done.stdout
    page = (clone / "records/README.md").read_text(encoding="utf-8")
    assert "(n=1) Ⓧ" in page and "MoreNoise](made/" in page and "| Ensemble |" in page
