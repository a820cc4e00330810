"""A population as one Hugging Face model, as transformers loads it; its tokenizer."""
import random
import types

import prepare
import pytest
import torch
from tiny import ROOT, VOCAB, build, random_tokens, seeded, small
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


def test_logits_are_the_mixture(mixture, model, folder):
    """The code imports nothing of this repository, which whoever loads it does not have."""
    assert len(model.members) > 1
    tokens = torch.randint(300, (3, 70), generator=seeded(0))
    wanted = mixture.log_probs(tokens[:, -64:])
    found = model(tokens, labels=tokens)
    assert_close(found.logits, wanted, **SAME)
    true = wanted[:, :-1].gather(2, tokens[:, 7:, None])
    assert_close(found.loss, -true.mean(), **SAME)
    found = transformers.dynamic_module_utils.get_imports(folder / "modeling_q0.py")
    assert set(found) <= {"__future__", "dataclasses", "hashlib", "math", "torch", "transformers"}


class Made(Mixture):
    """Of models that are in no run."""
    def member(self, i):
        return self.kept[i]


def test_features(tmp_path):
    """Every setting that changes the model. A folder without a tokenizer."""
    models = []
    for key in range(2):
        saved = tmp_path / f"members/{key}"
        q.save_member(saved, small(precision="bfloat16"), VOCAB, build(key).state_dict(), {})
        models.append(load_member(saved))
    made = Made(
        tmp_path, members=[0, 1], weights=[0.3, 0.7], heldout=None, kept=models,
        device=torch.device("cpu"), gate=None, manifest={"eot": 0, "vocab_size": VOCAB},
        encoding=None)
    tokens = random_tokens(2, 16)
    wanted = made.log_probs(tokens)
    export.write_folder(made, tmp_path)
    assert_close(load(tmp_path)(tokens).logits, wanted, **SAME)
    assert not list(tmp_path.glob("tokenizer*"))


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
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompts = ["bale", "mane kese kele " * 14]
    given = tokenizer(prompts, padding=True, return_tensors="pt")
    length = given.input_ids.size(1)
    assert 48 < length < 64
    ids = model.generate(**given, max_new_tokens=16, use_cache=True)
    texts = tokenizer.batch_decode(ids[:, length:])
    assert texts == [greedy(mixture, prompt, 16) for prompt in prompts]


# ranks of no training: merges make no `bde`, so it stands alone; `abcd` comes before its parts
UNLIKE_TRAINED = [bytes([i]) for i in range(256)] + [b"ab", b"abcd", b"cd", b"bde", b" a", b"a b"]
WORDS = ["don't", "'ll", "  ", "\n\n", "\r\n ", "\u00a0", "夜の街", "👩‍👧", "e\u0301", "1234", "١٢",
         " the", "abcd", "aabcdcd", "bde", "abde", export.EOT, "\x00", "\u2028"]


def test_tokenizer(corpus, tmp_path):
    """The ids of `Mixture.encode`, and back."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(WORDS, k=8)) for _ in range(60)]
    manifest = {"tokenizer": {"pattern": prepare.PATTERN}}
    for encoding in (
            load_tokenizer(corpus)["encoding"],
            prepare.load_bpe((ROOT / "data/wiki.tiktoken").read_bytes()),
            prepare.load_bpe(prepare.format_ranks(UNLIKE_TRAINED))):
        mixture = types.SimpleNamespace(encoding=encoding, manifest=manifest)
        export.write_tokenizer(mixture, 10 ** 6, tmp_path)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        for text in texts:
            ids = tokenizer(text).input_ids
            assert ids == [encoding.eot_token, *encoding.encode_ordinary(text)]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
