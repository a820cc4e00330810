"""Runs on the Hugging Face hub: `push` uploads one, and hf:USER/NAME is its name from then on, for
every command that takes a run. Its files come into the hub's own cache, all of one commit: result
and predictions first, a member once it is used. They are JSON, text and safetensors, of names that
are known before: nothing that comes from the hub is unpickled or run."""
import contextlib
import functools
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import train_q0 as q
from records import gate
from records.mixture import load_tokenizer
from records.population import (
    REMOTE, RESULT_BYTES, has_weights, load_predictions, read_predictions, recorded_hashes)
from records.use import parser_of, report_split

REPO = r"[\w.-]+/[\w.-]+"
NAME = re.compile(rf"hf:({REPO})(?:@([\w./-]+))?", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")
LOG_IN = "log in with a token that may do this (hf auth login, or HF_TOKEN)"


# The client of the hub --------------------------------------------------------------------------

def client():
    """Of the hub at HF_ENDPOINT as it is now; the library read it when it was imported."""
    try:
        from huggingface_hub import HfApi
    except ImportError as e:
        raise q.UserError(f"no client of the hub: pip install huggingface-hub ({e})") from None
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return HfApi(endpoint=endpoint or None)


@contextlib.contextmanager
def asking(what):
    """Turn what the client raises into one line; its versions share no class for what goes wrong
    in the network."""
    try:
        yield
    except Exception as e:
        raise q.UserError(f"{what}: {reason(e)}") from None


def reason(e):
    """What an exception of the client means, and what to do."""
    from huggingface_hub import errors
    if isinstance(e, (errors.LocalEntryNotFoundError, RuntimeError)) and e.__cause__:
        e = e.__cause__  # what kept it from the hub
    known = {  # a class before those it is of
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE keeps it from the network: unset it once",
        errors.LocalEntryNotFoundError: "it is not in the hub's cache, and there is no network",
        errors.GatedRepoError: "it is gated: ask for access on its page, and " + LOG_IN,
        errors.RepositoryNotFoundError: "no such model on the hub, or a private one: check its "
                                        "name, or " + LOG_IN,
        errors.RevisionNotFoundError: "it has no such revision",
        errors.EntryNotFoundError: "it is not there: this is no population that `push` uploaded, "
                                   "or half of one",
        errors.HFValidationError: q.one_line(e)}
    for kind, text in known.items():
        if isinstance(e, kind):
            return text
    if isinstance(e, errors.HfHubHTTPError):
        status = e.response.status_code
        said = " ".join((e.server_message or "without a word").split())
        advice = LOG_IN if status in (401, 403) else "try again later"
        return f"the hub answered {status} ({said}): {advice}"
    return f"{q.one_line(e)} (no network?): try again, what has arrived is kept"


# Runs on the hub --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Snapshot:
    """A run on the hub at one commit."""
    repo: str
    commit: str
    offline: bool  # there was no network: what the cache has is all there is

    @property
    def name(self):
        return f"hf:{self.repo}@{self.commit}"

    @property
    def plain_name(self):
        return self.repo.replace("/", "_")

    def fetch(self, *files):
        """Have these files in the cache. Raises UserError where that fails."""
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(self.fetch_file, files))

    def fetch_file(self, file):
        hub = client()
        with asking(f"{self.name}: {file}"):
            hub.hf_hub_download(
                self.repo, file, revision=self.commit, local_files_only=self.offline)

    def fetch_member(self, member):
        self.fetch(f"members/{member}/config.json", f"members/{member}/model.safetensors")


def snapshot(name):
    """Folder, in the hub's cache, of the run hf:USER/NAME, or hf:USER/NAME@REVISION: all but its
    members. A branch or tag is looked up once, here. Raises UserError where it is no run, and for
    what keeps it from the hub."""
    found = NAME.fullmatch(name)
    if found is None or ".." in name:
        raise q.UserError(f"{name} is not the name of a run on the hub: hf:USER/NAME, or "
                          "hf:USER/NAME@REVISION")
    repo, revision = found.groups(default="main")
    path, offline = find_run_json(name, repo, revision)
    folder = path.parent.resolve()
    run = Snapshot(repo, folder.name, offline)
    run.fetch("result.json", "data/manifest.json")
    run.fetch(*other_files(folder, run.name))
    REMOTE[folder] = run
    if revision != run.commit and q.set_by_torchrun("RANK", 0) == 0:
        why = ", as the cache has it: no network" if offline else ""
        print(f"notice: {name} is {run.name}{why}", file=sys.stderr)
    return folder


def other_files(folder, name):
    """Names of a run's files beside those of its members, as its result and manifest tell. Raises
    UserError where these are damaged."""
    with q.reading(f"the result of {name}"):
        if (folder / "result.json").stat().st_size > 1000 * RESULT_BYTES:  # before it is read
            raise ValueError("so many bytes are no result")
        result = q.load_json(folder / "result.json")
        members = [entry["member"] for entry in result["curve"]]
        tokenizer = q.load_json(folder / "data/manifest.json")["tokenizer"] or {}
    files = ["run.json", "result.json", "data/manifest.json"]
    files += [f"predictions/{i}.safetensors" for i in range(len(members))]
    if "file" in tokenizer:
        files.append("data/tokenizer.tiktoken")
    if "gate" in result:
        files.append(gate.FILE)
    if not {"pool_of", "average_of", "counted_of"} & result.keys():  # which have no log
        files.append("log.txt")
    return files


def find_run_json(name, repo, revision):
    """(path of run.json in the cache, whether it is there without a network)."""
    hub = client()
    from huggingface_hub import errors
    download = functools.partial(hub.hf_hub_download, repo, "run.json", revision=revision)
    with asking(name):
        cached = None
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            cached = Path(download(local_files_only=True))
        if cached and COMMIT.fullmatch(revision):  # which stays what it is
            return cached, False
        try:
            hub.model_info(repo, revision=revision)  # fails at once, a download after many tries
        except errors.HfHubHTTPError:
            raise
        except Exception:  # its versions share no class for a network that is not there
            if cached is None:
                raise
            return cached, True
    with asking(f"{name}: run.json"):
        return Path(download()), False


# push -------------------------------------------------------------------------------------------

def push(argv):
    """Upload a finished run to the Hugging Face hub: members, predictions, tokenizer, log, result
    and a model card. From then on its name is hf:USER/NAME in every command that takes a run."""
    parser = parser_of(push)
    parser.add_argument("repo", metavar="USER/NAME", help="of the model on the hub; it is made "
                        "where it is not there, and replaced where it is a run")
    parser.add_argument("--private", action="store_true", help="only you can see it")
    args = parser.parse_args(argv)
    if not re.fullmatch(REPO, args.repo, re.ASCII):
        raise q.UserError(f"{args.repo} is not USER/NAME, the name of a model on the hub")
    if args.run.startswith("hf:"):
        raise q.UserError(f"{args.run} is on the hub already: push takes a run of this machine")
    run = q.find_run(args.run)
    files = files_of(run)
    paths = paths_named(run)
    commit = upload(args.repo, args.private, files, model_card(run, args.repo, files))
    size = sum(path.stat().st_size for path in files.values())
    print(f"pushed {len(files) + 1} files, {size / 1e6:.1f} MB: a RUN named hf:{args.repo}, this "
          f"version of it hf:{args.repo}@{commit.oid}")
    if paths and not args.private:
        q.say(f"notice: everyone can read in its settings: {', '.join(paths)}", "stderr")


def files_of(run):
    """{name: path} of a run's files that others need: no state, no locks. Raises UserError where it
    is not finished or damaged, has lost weights, or its files are links, to what may be secret."""
    if not (run / "result.json").exists():
        raise q.UserError(f"{run} is not finished: go on with it (--resume), then push it")
    members = len(load_predictions(run)["heldout"])
    gone = [str(i) for i in range(members) if not has_weights(run, i)]
    if gone:
        raise q.UserError(f"{run} has no weights of members {', '.join(gone)} (--keep-members?): "
                          "its prior is of all of them; train it without, or push its average")
    load_tokenizer(run / "data")
    names = other_files(run, run)
    if (run / "curve.png").exists():
        names.append("curve.png")
    for i, sha256 in enumerate(recorded_hashes(run, "config", members)):
        check_member(run / f"members/{i}", sha256)
        names += [f"members/{i}/config.json", f"members/{i}/model.safetensors"]
    for name in names:
        if not (run / name).is_file() or (run / name).resolve() != run.resolve() / name:
            raise q.UserError(f"{run / name} is missing or a link: copy the file itself there")
    return {name: run / name for name in names}


def paths_named(run):
    """Paths in its settings that may say whose it is: absolute ones, and those outside."""
    with q.reading(run / "run.json"):
        text = (run / "run.json").read_text(encoding="utf-8")
    return sorted(set(re.findall(r'[" =]((?:/|\.\.|[A-Za-z]:)[^" ]*)', text)))


def check_member(folder, sha256):
    """Raise UserError where its files do not have the hashes that were recorded."""
    with q.reading(f"member {folder}"):
        weights = q.load_json(folder / "config.json")["sha256"]
        for name, recorded in (("config.json", sha256), ("model.safetensors", weights)):
            if q.sha256_of(folder / name) != recorded:
                raise ValueError(f"the sha256 of {name} is not the recorded one")


def upload(repo, private, files, card):
    """Commit files {name: path} and the card, at once, so that nobody sees half of a run:
    upload_folder makes a commit of every 250 files, and of every five minutes. Raises UserError
    where the repository holds something else, or others could see what is private."""
    hub = client()
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    with asking(f"hf:{repo}"):
        hub.create_repo(repo, private=private or None, exist_ok=True)
        info = hub.model_info(repo)
    if private and not info.private:
        raise q.UserError(f"hf:{repo} is there and public: make it private on its page, or give "
                          "another name")
    there = {file.rfilename for file in info.siblings}
    others = there - {".gitattributes", "README.md"}
    if others and "run.json" not in others:
        raise q.UserError(f"hf:{repo} is no run, it has {min(others)}: give another name")
    operations = [CommitOperationAdd("README.md", card.encode())]
    operations += [CommitOperationAdd(name, path) for name, path in files.items()]
    left = re.compile(r"log\.txt|curve\.png|gate\.safetensors|data/tokenizer\.tiktoken|"
                      r"(members|predictions)/\d+\D.*")
    operations += [CommitOperationDelete(name) for name in sorted(there - files.keys())
                   if left.fullmatch(name)]  # of a run that was there before
    with asking(f"hf:{repo}"):
        return hub.create_commit(repo, operations, commit_message=f"{len(files)} files of a run")


CARD = """\
---
library_name: q0
pipeline_tag: text-generation
tags:
- q0
- ensemble
---

# {title}

A population of {members} language models that mix their predictions with weights fitted on held-out
text, {origin}. Made with `train_q0.py` ([q0](https://arxiv.org/abs/2606.03938)).

- Each member: {parameters:,} parameters, {layers} layers, width {width}, a context of {seq_len}
  tokens, a vocabulary of {vocab_size:,}.
- Text it was trained on: {data} ({description}). Licence of that text: {licence}. The licence of
  the weights is for their author to state.

| k | uniform | learned | pruned |
|---|---|---|---|
{rows}

Loss on {split} text, in nats per token, of the k members of largest weight, mixed uniformly and
with their weights; and of the best k, found by pruning.
{picture}
## Use

Beside `train_q0.py`. Only members in use are downloaded; nothing is unpickled or run.

```bash
python train_q0.py select hf:{repo}
python train_q0.py sample hf:{repo} --k {k} --prompt "The"
python train_q0.py evaluate hf:{repo} --k {k} --data SHARD
```

```python
from records.mixture import load_mixture
mixture = load_mixture("hf:{repo}", k={k})
```

`run.json` has the settings, `result.json` the loss after each member and the hash of each file of
theirs, `data/manifest.json` the hashes of the text.
"""


def origin_of(result):
    if "counted_of" in result:
        return "of which the last ones count n-grams"
    if "pool_of" in result:
        return f"pooled from {len(result['pool_of'])} runs"
    if "average_of" in result:
        return "each the mean weights of a trajectory's newest members"
    cfg = result["config"]
    return f"trained for {cfg['epochs']} epochs in all (`--population {cfg['population']}`)"


def model_card(run, repo, files):
    """README.md of a run on the hub. Raises UserError where its result is damaged."""
    with q.reading(f"the result of {run}"):
        result = q.load_json(run / "result.json")
        member = q.load_json(run / "members/0/config.json")
        manifest = q.load_json(run / "data/manifest.json")
        cfg, _ = q.resolve(replace(q.Config(**member["config"]), device="cpu"))
        table = q.parameter_table(cfg, member["vocab_size"])
        row = "| {k} | {uniform:.5f} | {learned:.5f} | {pruned:.5f} |"
        rows = [row.format(**entry) for entry in result["table"]["rows"]]
        members = len(result["curve"])
        return CARD.format(
            title=repo.split("/")[1], repo=repo, origin=origin_of(result), members=members,
            parameters=sum(math.prod(bank.bank_shape) for bank in table.values()),
            layers=cfg.layers, width=cfg.width, seq_len=cfg.seq_len,
            vocab_size=member["vocab_size"], rows="\n".join(rows),
            split=report_split(read_predictions(run / "predictions/0.safetensors")),
            picture="\n![Loss against epochs](curve.png)\n" if "curve.png" in files else "",
            k=min(members, 4), data=manifest["name"],
            description=manifest["source"].get("description", "text of its author's"),
            licence=manifest["source"].get("licence", "not stated"))
