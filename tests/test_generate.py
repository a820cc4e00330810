"""Text with cached keys and values, against forward passes over all of the context."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import VOCAB, build, random_tokens

import train_q0 as q
from records import generate
from records.mixture import Mixture, Text

END = VOCAB - 1
T = 16


class Letters:
    """An encoding of bytes."""
    eot_token = END
    n_vocab = VOCAB

    def encode_ordinary(self, text):
        return [*text.encode()]

    def decode_single_token_bytes(self, token):
        return bytes([token])


@pytest.mark.parametrize("temperature, top_p, expected", [
    (0.5, 1, [72.5, 18.1, 6.5, 2.9]),  # in proportion to the squares
    (1, 0.75, [66.7, 33.3, 0, 0]),  # the first two have it exactly
    (1, 0.76, [55.6, 27.8, 16.7, 0])])
def test_frequencies_of_what_is_drawn(temperature, top_p, expected):
    log_p = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    text = Text(Letters(), 0)
    drawn = [text.draw(log_p, temperature, top_p) for _ in range(1000)]
    percent = np.bincount(drawn, minlength=4) / 10
    np.testing.assert_allclose(percent, expected, atol=6)  # deviations are 1.6 at most


def test_pieces():
    """A text ends with the document, whose end is not shown, as half a character is not."""
    text = Text(Letters(), 0)
    assert [text.piece(token) for token in (97, END, 98, None)] == ["a", "", "", ""]
    assert text.ended
    text = Text(Letters(), 0)
    assert [text.piece(token) for token in (0xE2, None)] == ["", "\ufffd"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """mixed(options) -> a mixture of members with all features, and one of another shape."""
    folder = tmp_path_factory.mktemp("generate")
    every = dict(layers=3, loop_first=1, loop_last=1, loop_passes=2, dropout=0.1)
    fewer = dict(windows="L", unet=False, loop_passes=1, smear=False, induction=False,
                 head_mixing=False, mtp_weight=0.0)
    for i, changes in enumerate((every, every, every | fewer)):
        model = build(i, **changes)
        q.save_member(folder / f"members/{i}", model.cfg, VOCAB, dict(model.named_parameters()), {})

    def make(**options):
        return Mixture(
            folder,
            members=[2, 0, 1],
            weights=[0.5, 0.3, 0.2],
            heldout=np.ones((3, 1)),
            kept=[0, 1, 2],
            device=torch.device("cpu"),
            gate=None,
            manifest={},
            encoding=Letters(),
            **options)
    return make


def test_log_probs(mixed, monkeypatch):
    """At every position, also beyond the context: there the newer half and what follows count."""
    monkeypatch.setattr(generate, "READ_ROWS", 4)  # a long text is read in parts
    mixture = mixed()
    tokens = random_tokens(2, 27)  # the window moves twice
    tokens[:, :5] = tokens[:1, :5]
    reader = mixture.reader()
    found = [reader.read(tokens[:1, :5]).expand(2, -1)]
    reader.repeat(2)
    for token in tokens[:, 5:].split(1, dim=1):
        found.append(reader.read(token))
    start = 0
    wanted = mixture.log_probs(tokens[:, :T])
    for end, log_p in enumerate(found, start=5):
        if end - start > T:
            start += T // 2
            wanted = mixture.log_probs(tokens[:, start:start + T])
        # float32, products of other shapes
        torch.testing.assert_close(log_p, wanted[:, end - start - 1], atol=2e-5, rtol=0)


def plain_text(mixture, prompt, tokens, number):
    """Sample `number` without caches."""
    text = Text(mixture.encoding, q.seed_of("sample", 7, number))
    context = mixture.encode(prompt)[-T:]
    pieces = ""
    for _ in range(tokens):
        log_p = mixture.log_probs(torch.tensor([context]))[0, -1]
        context.append(text.draw(log_p, 1.0, 0.9))
        pieces += text.piece(context[-1])
        if len(context) > T:
            context = context[T // 2:]
    return pieces + text.piece(None)


def test_samples(mixed, capsys):
    """Each is what it is without caches, and without the others; also where members are read from
    the disk for every token."""
    one = mixed()
    two = mixed(samples=2, stream=True)
    prompt = "HARE AND HOUND ARE OLD"
    options = dict(tokens=10, top_p=0.9, seed=7)
    texts = ["".join(text) for text in zip(*two.write(prompt, **options))]
    assert texts == [plain_text(one, prompt, 10, i) for i in range(2)]
    assert texts[0] != texts[1]
    assert "read from the disk" in capsys.readouterr().err
    assert "".join(one.generate(prompt, **options)) == texts[0]


def test_place():
    """One device after the other, a tenth of each is left; None where the last is too small."""
    files = [SimpleNamespace(shape="a", bytes_on=lambda device, texts: 40 * texts)] * 4
    found = generate.place(files, [("x", 100), ("y", 30), ("z", 100)], 1)
    sizes = {key: len(group) for key, group in found.items()}
    assert sizes == {("x", "a"): 2, ("z", "a"): 2}
    assert generate.place(files, [("x", 100), ("z", 80)], 1) is None
