"""A population as one Hugging Face model, as transformers loads it; its tokenizer."""
import json
import types

import prepare
import pytest
import torch
from hypothesis import example, given, settings, strategies
from tiny import (
    ROOT,
    VOCAB,
    build,
    fails,
    flip,
    random_tokens,
    small,
    with_file,
    works)
from torch.testing import assert_close

import train_q0 as q
from records import export
from records.mixture import Mixture, load_mixture, load_tokenizer
from records.population import load_member

transformers = pytest.importorskip("transformers")
SAME = dict(atol=1e-5, rtol=0)  # float32: products of other shapes may add in another order


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Where transformers copies the code of a folder to."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("modules")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
        patch.syspath_prepend(cache)
        yield


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options)


def load_tokens(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def mixture(finished):
    return load_mixture(finished)


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """Of all members that have weight."""
    out = tmp_path_factory.mktemp("export") / "hf"
    assert q.main(["export", str(finished), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


# Log-probabilities ------------------------------------------------------------------------------

def test_logits_are_the_mixture(mixture, model):
    assert len(model.members) > 1
    tokens = torch.randint(300, (3, 70), generator=torch.Generator().manual_seed(0))
    wanted = mixture.log_probs(tokens[:, -64:])
    found = model(tokens, labels=tokens)
    assert found.logits.dtype == torch.float32
    assert_close(found.logits, wanted, **SAME)
    true = wanted[:, :-1].gather(2, tokens[:, 7:, None])
    assert_close(found.loss, -true.mean(), **SAME)
    last, = model(tokens, logits_to_keep=2, return_dict=False)
    assert_close(last, wanted[:, -2:], **SAME)


def test_padding(mixture, model):
    """At the left or right of rows, each is as if alone; nothing else can be hidden."""
    tokens = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :15] = 0
    mask[1, 17:] = 0
    logits = model(tokens, attention_mask=mask).logits
    for row, part in enumerate((slice(15, 20), slice(17), slice(20))):
        assert_close(logits[row:row + 1, part], mixture.log_probs(tokens[row:row + 1, part]),
                     **SAME)
    mask[2, 3] = 0
    for wrong in (mask, mask[:, :5], mask[:, None, None]):
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(tokens, attention_mask=wrong)


class Made(Mixture):
    """Of models that are in no run."""
    def member(self, i):
        return self.kept[i]


@pytest.fixture
def made(tmp_path):
    """made(precision) -> Made of two models of all features."""
    def make(precision):
        models = []
        for key in range(2):
            saved = tmp_path / f"{precision}{key}"
            q.save_member(
                saved, small(precision=precision), VOCAB, build(key).state_dict(), {})
            models.append(load_member(saved))
        return Made(
            tmp_path, members=[0, 1], weights=[0.3, 0.7], heldout=None, kept=models,
            device=torch.device("cpu"), gate=None, manifest={"eot": 0, "vocab_size": VOCAB},
            encoding=None)
    return make


def test_features_and_precision(made, tmp_path, capsys):
    """Every setting that changes the model; it computes in the members' precision, or in another
    that is asked for. A folder without a tokenizer."""
    tokens = random_tokens(2, 16)
    wanted = {}
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        out.mkdir()
        mixture = made(precision)
        wanted[precision] = mixture.log_probs(tokens)
        export.write_folder(mixture, out)
        assert_close(load(out)(tokens).logits, wanted[precision], **SAME)
    other = load(tmp_path / "float32", dtype=torch.bfloat16)
    assert_close(other(tokens).logits, wanted["bfloat16"], **SAME)
    assert (wanted["float32"] - wanted["bfloat16"]).abs().max() > 1e-3
    assert "has no tokenizer" in capsys.readouterr().out
    assert not list(out.glob("tokenizer*"))


def test_one_model(finished, logs, tmp_path, capsys):
    """The best member, and a run's average."""
    works(capsys, "average", finished, "--last", 2, "--name", "mean")
    tokens = torch.arange(20)[None]
    for run in (finished, logs / "mean"):
        out = tmp_path / run.name
        assert "members:1 " in works(capsys, "export", run, "--k", 1, "--out", out)
        wanted = load_mixture(run, k=1).log_probs(tokens)
        assert_close(load(out)(tokens).logits, wanted, **SAME)


def test_code_stands_alone(folder):
    """It imports nothing of this repository, which whoever loads it does not have."""
    found = transformers.dynamic_module_utils.get_imports(folder / "modeling_q0.py")
    assert set(found) <= {"__future__", "dataclasses", "hashlib", "math", "torch", "transformers"}


# Text -------------------------------------------------------------------------------------------

def greedy(mixture, prompt, number):
    """The likeliest tokens after a prompt, as text."""
    ids = mixture.encode(prompt)
    begin = len(ids)
    for _ in range(number):
        log_p = mixture.log_probs(torch.tensor([ids[-64:]]))
        ids.append(int(log_p[0, -1].argmax()))
    return mixture.encoding.decode(ids[begin:])


def test_generate(mixture, model, folder):
    """Greedy text of several prompts, padded at the left, is that of each alone; also past the end
    of the context, where the last tokens are seen."""
    tokenizer = load_tokens(folder)
    prompts = ["bale", "dore belo rone ", "mane kese kele " * 14]
    given = tokenizer(prompts, padding=True, return_tensors="pt")
    length = given.input_ids.size(1)
    assert 48 < length < 64
    ids = model.generate(**given, max_new_tokens=16, use_cache=True)
    texts = tokenizer.batch_decode(ids[:, length:])
    assert texts == [greedy(mixture, prompt, 16) for prompt in prompts]


# ranks of no training: merges make no `bde`, so it stands alone; `abcd` comes before its parts
UNLIKE_TRAINED = [bytes([i]) for i in range(256)] + [b"ab", b"abcd", b"cd", b"bde", b" a", b"a b"]


@pytest.fixture(scope="module")
def tokenizers(corpus, tmp_path_factory):
    """[(the project's, transformers'), ...]"""
    encodings = [load_tokenizer(corpus)["encoding"],
                 prepare.load_bpe((ROOT / "data/wiki.tiktoken").read_bytes()),
                 prepare.load_bpe(prepare.format_ranks(UNLIKE_TRAINED))]
    found = []
    for encoding in encodings:
        out = tmp_path_factory.mktemp("tokenizer")
        manifest = {"tokenizer": {"pattern": prepare.PATTERN}}
        export.write_tokenizer(
            types.SimpleNamespace(encoding=encoding, manifest=manifest), 10 ** 6, out)
        found.append((encoding, transformers.PreTrainedTokenizerFast.from_pretrained(out)))
    return found


WORDS = ["don't", "'ll", "  ", "\n\n", "\r\n ", "\u00a0", "夜の街", "👩‍👧", "e\u0301", "1234", "١٢",
         " the", "abcd", "aabcdcd", "bde", "abde", export.EOT, "\x00", "\u2028"]
TEXTS = strategies.lists(
    strategies.sampled_from(WORDS) | strategies.text(strategies.characters(exclude_categories=(
        "Cs", "Cn")), max_size=8)).map("".join)


@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
@example(text=" ".join(WORDS))
def test_tokenizer(text, tokenizers):
    """The ids of `Mixture.encode`, and back."""
    for encoding, tokenizer in tokenizers:
        ids = tokenizer(text).input_ids
        assert ids == [encoding.eot_token, *encoding.encode_ordinary(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


# Mistakes ---------------------------------------------------------------------------------------

def test_folder_is_taken(finished, tmp_path, capsys):
    fails(capsys, "exists: give another --out", "export", finished, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(copied, tmp_path, capsys):
    last = json.loads((copied / "result.json").read_text())["table"]["ranked"][1]
    with_file(f"members/{last}/model.safetensors", flip)(copied)
    fails(capsys, "is missing or damaged", "export", copied, "--out", tmp_path / "new/hf")
    assert not list((tmp_path / "new").iterdir())
