"""The pages' commands run, or parse where they need a GPU or a network; their links lead somewhere.

Above each block of commands stands what it needs: `<!-- runs here -->`, `<!-- needs a GPU -->`, ...
"""
import re
import shlex
import shutil

import prepare
import pytest
import tasks
import yaml  # huggingface-hub needs it
from tiny import ROOT, works

import train_q0 as q
from records import figures
from records.commands import COMMANDS

PAGES = ("README.md", "data/README.md")
KINDS = {"runs here", "needs lm_eval", "needs a GPU", "needs a network"}
# of the preset, so that the lines run as they stand
FEWER_WEIGHTS = dict(
    width=32, head_dim=16, mlp_hidden=32, seq_len=32, batch_tokens=2048, micro_batch=64)


def blocks():
    """[(kind or None, [command, ...])], continued lines joined."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    block = r"(?:<!-- ([^\n]*) -->\n)?^```(bash|sh|console|python)\n(.*?)^```"
    found = []
    for kind, language, body in re.findall(block, text, re.M | re.S):
        lines = body.replace("\\\n", " ").splitlines()
        if language == "python":
            lines = [f"python -c {shlex.quote(body)}"]
        found.append((kind or None, [line for line in lines if line and line[0] != "#"]))
    return found


def lines_that(*kinds):
    return [line for kind, lines in blocks() if kind in kinds for line in lines]


def lines_of_clusters():
    """Commands of the files for Slurm and SkyPilot."""
    script = (ROOT / "records/slurm.sh").read_text(encoding="utf-8")
    task = yaml.safe_load((ROOT / "records/sky.yaml").read_text(encoding="utf-8"))
    lines = [line for line in script.splitlines() if line[0] != "#"]
    return [*lines, *task["setup"].splitlines(), *task["run"].splitlines()]


def test_tags():
    assert {kind for kind, _ in blocks()} == KINDS  # None: a block without a tag
    network = lines_that("needs a network")
    for command in ("pip install", "python train_q0.py", "pytest", "prepare.py fineweb"):
        assert any(command in line for line in network)


def test_links():
    """Every relative link of a page leads to a file of this repository."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("data/*.md"), *ROOT.glob("records/**/*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_figures(monkeypatch):
    """A population has one colour in all of them."""
    axes = []
    monkeypatch.setattr(figures, "save", lambda figure, name: axes.extend(figure.axes))
    figures.main()
    drawn = [artist for axis in axes for artist in (*axis.lines, *axis.texts)]
    for name, color in figures.COLORS.items():
        named = re.compile(rf"(['(]|parameters, ){name}( \(|, seed|, the|')")
        assert {x.get_color() for x in drawn if named.search(str(x))} == {color}


def test_commands_run(corpus, logs, tmp_path, monkeypatch, capsys, request):
    """With another default corpus and fewer weights."""
    shutil.copytree(corpus, tmp_path / "data/wiki")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(q.PRESETS, "tiny", FEWER_WEIGHTS)
    lines = lines_that("runs here")
    if request.getfixturevalue("harness"):
        lines += lines_that("needs lm_eval")
    assert len(lines) > 10
    for line in lines:
        python, script, *argv = shlex.split(line, comments=True)
        assert python == "python"
        if script == "train_q0.py":
            works(capsys, *argv)
        elif script == "-c":
            exec(argv[0], {})
        else:
            assert script == "data/tasks.py" and not tasks.main(argv)


def parsed_by(command, monkeypatch):
    """The command up to where it has read its flags."""
    def run(argv):
        parse = q.Parser.parse_args

        def stop(parser, argv):
            parse(parser, argv)
            raise EOFError
        with monkeypatch.context() as patch, pytest.raises(EOFError):
            patch.setattr(q.Parser, "parse_args", stop)
            command(argv)
    return run


def test_other_commands_parse(monkeypatch):
    """Those that need a GPU or a network."""
    monkeypatch.setattr(q, "launch", lambda *args: None)
    for command in ("push", "sample"):
        monkeypatch.setitem(COMMANDS, command, parsed_by(COMMANDS[command], monkeypatch))
    scripts = set()
    for line in [*lines_that("needs a GPU", "needs a network"), *lines_of_clusters()]:
        for part in re.split(r"&&|;|\|", line):
            words = shlex.split(part, comments=True)
            if words[0] in ("pip", "sbatch", "sky") or "pytest" in words:
                continue
            script, = [word for word in words if word.endswith(".py")]
            argv = words[words.index(script) + 1:]
            if script == "data/prepare.py":
                prepare.parse(argv)
            else:
                assert script == "train_q0.py" and q.main(argv) == 0
            scripts.add(script)
    assert scripts == {"train_q0.py", "data/prepare.py"}
