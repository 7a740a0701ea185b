import builtins
import gzip
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from statprune.data import (
    Text,
    calibration_windows,
    consecutive_windows,
    evaluation_windows,
    generated_windows,
    how_drawn,
    random_windows,
    read_text,
    standard_library_text,
    tokenize,
)
from statprune.errors import CalibrationError, CalibrationWarning
from statprune.loading import load_model, load_tokenizer

TEXT = "to be or not to be, that is the question\n"


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return load_model(tiny_model_folder)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


def windows(sources, model, tokenizer, samples=3, seqlen=8, seed=0):
    return calibration_windows(sources, tokenizer=tokenizer, model=model, samples=samples, seqlen=seqlen, seed=seed)


def test_consecutive_windows_drop_the_last_partial_one():
    assert consecutive_windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_random_windows_are_stretches_of_the_text_and_repeat_with_the_seed():
    tokens = torch.arange(100)
    first, again, other = (random_windows(tokens, 5, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first - first[:, :1] == torch.arange(10)).all()
    assert torch.equal(random_windows(tokens, 2, 100, 0), tokens.expand(2, 100))


@pytest.mark.parametrize("cut", [consecutive_windows, lambda tokens, n: random_windows(tokens, 1, n, 0)])
def test_a_text_shorter_than_a_window_is_refused(cut):
    with pytest.raises(CalibrationError, match=r"5 tokens, less than one window of 6.*smaller --seqlen"):
        cut(torch.arange(5), 6)


def test_files_are_joined_by_blank_lines(tmp_path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    assert read_text([tmp_path / "a", tmp_path / "b"]) == "one\n\ntwo"


def test_a_count_of_one_is_singular():
    with pytest.raises(CalibrationError, match=r"has 1 token, less than one window of 2"):
        consecutive_windows(torch.arange(1), 2)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_missing_or_binary_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"x\.txt cannot be read"):
        read_text([tmp_path / "x.txt"])


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(CalibrationError, match=r"vocabulary has 10: this tokenizer belongs to another model"):
        tokenize(tokenizer, TEXT, vocabulary=10)


def test_text_files_give_windows(tmp_path, model, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT * 10)
    got = windows([str(tmp_path / "a.txt")], model, tokenizer)
    assert got.shape == (3, 8)
    whole = evaluation_windows([str(tmp_path / "a.txt")], tokenizer=tokenizer, model=model, seqlen=8)
    assert tokenizer.decode(whole.flatten()) == (TEXT * 10)[: len(tokenizer.decode(whole.flatten()))]


def test_the_model_samples_its_own_windows_and_leaves_the_random_state_alone(model):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = windows(["generated"], model, None)
    assert torch.equal(torch.rand(1), expected)
    assert first.shape == (3, 8)
    assert torch.equal(first, windows(["generated"], model, None))
    assert not torch.equal(first, windows(["generated"], model, None, seed=1))
    assert (first[:, 1:] != model.config.eos_token_id).all()


def test_generated_windows_are_told_as_they_come(model):
    told = []
    generated_windows(model, 3, 8, 0, batch_size=2, progress=lambda *step: told.append(step))
    assert told == [(2, 3, "windows"), (3, 3, "windows")]


@pytest.mark.parametrize("key", ["", ":calibration"])
def test_a_token_file_gives_its_first_windows(tmp_path, model, key):
    tokens = torch.arange(40, dtype=torch.int32).view(4, 10)
    save_file({"calibration": tokens}, tmp_path / "tokens.safetensors")
    got = windows([f"{tmp_path}/tokens.safetensors{key}"], model, None)
    assert got.dtype == torch.int64
    assert torch.equal(got, tokens[:3, :8].long())


@pytest.mark.parametrize(
    ("source", "samples", "message"),
    [
        ("tokens.safetensors", 1, r"holds a, b: name one, as in FILE\.safetensors:a"),
        ("tokens.safetensors:c", 1, "holds a, b"),
        ("tokens.safetensors:a", 5, "at least 5 windows of at least 8 tokens"),
        ("tokens.safetensors:b", 1, "expected whole numbers"),
        ("none.safetensors", 1, "cannot be read"),
    ],
)
def test_a_token_file_that_does_not_fit_is_explained(tmp_path, model, source, samples, message):
    save_file({"a": torch.zeros(4, 10, dtype=torch.int32), "b": torch.zeros(4, 10)}, tmp_path / "tokens.safetensors")
    with pytest.raises(CalibrationError, match=message):
        windows([f"{tmp_path}/{source}"], model, None, samples=samples)


def test_a_data_set_gives_one_window_a_long_document(tmp_path, model, tokenizer):
    pytest.importorskip("datasets")
    documents = [{"text": TEXT * repeats} for repeats in (1, 5, 6, 7, 8, 8)] + [{"text": "short"}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    got = windows([str(tmp_path)], model, tokenizer, samples=4, seqlen=32)
    assert got.shape == (4, 32)
    with pytest.raises(CalibrationError, match="4 different documents longer than 32 tokens, wanted: 9"):
        windows([str(tmp_path)], model, tokenizer, samples=9, seqlen=32)
    with pytest.raises(CalibrationError, match="has the columns text: expected text in 'body'"):
        windows([f"{tmp_path}:::body"], model, tokenizer)


def test_a_name_that_is_neither_file_nor_data_set_says_what_to_give(model, tokenizer):
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match=r"no-such-set: there is no such file, and the data set .* Give text files, or"):
        windows(["no-such-set"], model, tokenizer)


def test_without_datasets_the_way_out_is_named(model, tokenizer, monkeypatch):
    original = builtins.__import__

    def no_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(CalibrationError, match=r"pip install 'statprune\[data\]'"):
        windows(["c4"], model, tokenizer)


def test_the_standard_library_is_split_by_module():
    training, held_out = standard_library_text(100_000)
    assert len(training) == len(held_out) == 100_000
    assert held_out[:1000] not in training


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def sentencepiece_like():
    """As LLaMA's: a space is a character of its own, put before the text too, and no word ends at it."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, max_token_length=12, show_progress=False)


SPECIAL = ["<s>", "</s>", "<unk>"]
PROSE = "".join(
    f"{number} bottles of beer; take {number % 7} down,  pass it round:\n"
    f"{'    ' * (number % 4)}bière n° {number * 7919 % 1000} €\n"
    for number in range(400)
)


@pytest.fixture(scope="module", params=[byte_level, sentencepiece_like])
def with_special_tokens(request):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer, trainer = request.param()
    tokenizer.train_from_iterator(PROSE.splitlines()[:200], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def small_pieces(monkeypatch):
    for name, number in {"tokens.PIECE": 900, "files.PIECE": 700, "tokens.HISTORY": 450, "tokens.CONTEXT": 60}.items():
        monkeypatch.setattr(f"statprune.data.{name}", number)


class Counting:
    """A tokenizer that counts the characters that it is given, and the most of them at once."""

    is_fast = True

    def __init__(self, tokenizer):
        self.tokenizer, self.characters, self.most = tokenizer, 0, 0

    def __call__(self, text, **settings):
        self.characters += len(text)
        self.most = max(self.most, len(text))
        return self.tokenizer(text, **settings)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("text", [PROSE, PROSE[:5000] + "=" * 300 + "日本語" * 400 + "\n" * 200 + " </s> " + PROSE[:3000]])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, with_special_tokens, text):
    whole = torch.tensor(with_special_tokens(text, verbose=False)["input_ids"])
    counting = Counting(with_special_tokens)
    assert torch.equal(tokenize(counting, text), whole)
    assert counting.most < 2000 < len(text)
    (tmp_path / "a.txt").write_text(text)
    assert torch.equal(tokenize(counting, Text([tmp_path / "a.txt"])), whole)
    counting = Counting(with_special_tokens)
    assert torch.equal(tokenize(counting, text, limit=100), whole[:100])
    assert counting.characters < 2000


@pytest.mark.usefixtures("small_pieces")
def test_what_is_the_same_for_long_is_tokenized_whatever_the_piece(with_special_tokens):
    text = "x" + "-" * 5000 + PROSE
    whole, got = with_special_tokens(text)["input_ids"], tokenize(with_special_tokens, text).tolist()
    assert got[-1000:] == whole[-1000:]
    assert abs(len(got) - len(whole)) < 20


def is_stretch(window, whole):
    return (whole.unfold(0, len(window), 1) == window).all(1).any()


def test_of_a_large_text_only_the_neighbourhoods_of_windows_are_tokenized(tmp_path, model, with_special_tokens, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + (PROSE * 5).replace("\n", "\r\n").encode())
    (tmp_path / "b.txt").write_text(PROSE * 5)
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    whole = tokenize(with_special_tokens, read_text(sources))
    monkeypatch.setattr("statprune.data.sources.LARGE", 1000)
    monkeypatch.setattr(model.config, "vocab_size", 400)
    counting = Counting(with_special_tokens)
    got = windows(sources, model, counting, samples=20, seqlen=16)
    assert got.shape == (20, 16)
    assert all(is_stretch(window, whole) for window in got)
    assert len({tuple(window.tolist()) for window in got}) > 15
    assert counting.most < 3000
    assert torch.equal(got, windows(sources, model, with_special_tokens, samples=20, seqlen=16))
    assert not torch.equal(got, windows(sources, model, with_special_tokens, samples=20, seqlen=16, seed=1))
    assert how_drawn(sources, counting) == "random bytes of the text"
    monkeypatch.setattr(model.config, "vocab_size", 20)
    with pytest.raises(CalibrationError, match="this tokenizer belongs to another model"):
        windows(sources, model, with_special_tokens, samples=20, seqlen=16)


def test_a_place_too_near_to_the_end_is_drawn_again_before_it(tmp_path, model, with_special_tokens, monkeypatch):
    (tmp_path / "a.txt").write_text(PROSE[:300])
    monkeypatch.setattr("statprune.data.sources.LARGE", 100)
    monkeypatch.setattr(model.config, "vocab_size", 400)
    inner = tokenize(with_special_tokens, PROSE[:300])[1:-1]
    seqlen = len(inner) - 2
    with pytest.warns(CalibrationWarning, match="about"):
        got = windows([str(tmp_path / "a.txt")], model, with_special_tokens, samples=2, seqlen=seqlen)
    assert all(is_stretch(window, inner) for window in got)
    with pytest.raises(CalibrationError, match=r"has less than .* tokens: expected a window in it"):
        windows([str(tmp_path / "a.txt")], model, with_special_tokens, samples=2, seqlen=len(inner) + 1)


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(4, 5000), seqlen=st.integers(2, 300), samples=st.integers(2, 40), seed=st.integers(-(2**63), 2**63 - 1)
)
def test_no_token_of_a_text_is_in_both_halves(length, seqlen, samples, seed):
    if length < 2 * seqlen:
        with pytest.raises(CalibrationError, match=r"less than (one|two) windows? of"):
            random_windows(torch.arange(length), samples, seqlen, seed, halves=True)
        return
    drawn = random_windows(torch.arange(length), samples, seqlen, seed, halves=True)
    assert drawn.shape == (samples, seqlen)
    assert (drawn.diff(dim=1) == 1).all()
    assert not set(drawn[::2].flatten().tolist()) & set(drawn[1::2].flatten().tolist())


def test_halves_are_of_all_parts_of_a_text():
    drawn = random_windows(torch.arange(10_000), 400, 10, 0, halves=True)
    for half in (drawn[::2], drawn[1::2]):
        assert half.float().mean() == pytest.approx(5000, abs=500)
        assert len(half.flatten().unique()) > 1000


@pytest.mark.parametrize("samples", [2, 9])
def test_no_token_of_a_large_text_is_in_both_halves(tmp_path, model, tokenizer, monkeypatch, samples):
    # Every word is another one, so that a window says where it is.
    (tmp_path / "a.txt").write_text(" ".join(f"{number:05}" for number in range(9000)))
    monkeypatch.setattr("statprune.data.sources.LARGE", 1000)
    monkeypatch.setattr("statprune.data.places.BYTES_PER_TOKEN_OF_BLOCK", 4)
    for seed in range(5):
        drawn = calibration_windows(
            [str(tmp_path / "a.txt")], tokenizer=tokenizer, model=model, samples=samples, seqlen=30, seed=seed, halves=True
        )
        words = [
            {word for window in half for word in tokenizer.decode(window).split()[1:-1]} for half in (drawn[::2], drawn[1::2])
        ]
        assert words[0]
        assert words[1]
        assert not words[0] & words[1]


def test_calibration_windows_in_halves_are_those_of_the_text(tmp_path, model, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT * 20)
    sources = [str(tmp_path / "a.txt")]
    drawn = calibration_windows(sources, tokenizer=tokenizer, model=model, samples=4, seqlen=8, halves=True)
    assert torch.equal(drawn, random_windows(tokenize(tokenizer, TEXT * 20), 4, 8, 0, halves=True))
    assert how_drawn(sources, tokenizer) == "random tokens of the text"
    assert how_drawn(sources, tokenizer, halves=True).startswith("random tokens of alternate blocks")
    assert [how_drawn(other, tokenizer) for other in (["generated"], ["x.safetensors:a"], ["c4"])] == [None] * 3


def test_windows_that_must_overlap_are_told_and_windows_that_must_repeat_refused(tmp_path, model, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    num_tokens = len(tokenize(tokenizer, TEXT))
    with pytest.warns(
        CalibrationWarning, match=rf"has {num_tokens} tokens, which 3 windows of {num_tokens - 2} cover .* times"
    ):
        windows([str(tmp_path / "a.txt")], model, tokenizer, samples=3, seqlen=num_tokens - 2)
    with pytest.raises(CalibrationError, match=r"3 places for a window of .*, fewer than the 4 windows that are wanted"):
        windows([str(tmp_path / "a.txt")], model, tokenizer, samples=4, seqlen=num_tokens - 2)


@pytest.mark.parametrize("sources", [["generated"], ["a.txt"], ["tokens.safetensors"]])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"seqlen": 1}, "--seqlen 1: expected at least 2"),
        ({"samples": 0}, "--samples 0: expected at least 1"),
        ({"samples": 10**20}, r"--samples 1000.* expected at most .* tokens together"),
        ({"seed": 2**63}, r"--seed \d+: expected a number of 64 bits"),
        ({"seed": -(2**63) - 1}, r"--seed -\d+: expected a number of 64 bits"),
    ],
)
def test_numbers_of_windows_that_cannot_be_are_refused_first(model, sources, numbers, message):
    with pytest.raises(CalibrationError, match=message):
        windows(sources, model, None, **numbers)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nul.txt", b"one\0two", "nul.txt cannot be read: it has NUL characters in it"),
        ("wide.txt", "one two".encode("utf-16-le"), "it has NUL characters in it, so it is binary or UTF-16"),
        ("marked.txt", "one two".encode("utf-16"), "it is UTF-16. Expected plain UTF-8 text"),
        ("packed.txt.gz", gzip.compress(b"one two", mtime=0), "it is gzip. .*unpack"),
        ("table.txt", b"PAR1\x15\x04", "it is Parquet"),
        ("records.jsonl", b'{"text": "one"}', r"records.jsonl cannot be read: \.jsonl is a file of records, .*:::COLUMN"),
        ("latin.txt", "é".encode("latin-1") * 9, "latin.txt cannot be read: .*Expected UTF-8"),
    ],
)
def test_what_is_no_plain_text_is_named(tmp_path, model, tokenizer, monkeypatch, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_text([path])
    monkeypatch.setattr("statprune.data.sources.LARGE", 1)
    with pytest.raises(CalibrationError, match=message):
        windows([str(path)], model, tokenizer, seqlen=2)


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text([tmp_path / "a.txt", tmp_path / "a.txt"]) == "one\ntwo\n\none\ntwo"


def test_the_text_between_places_is_cut_at_characters(tmp_path):
    (tmp_path / "a.txt").write_text("aé日🙂")
    (tmp_path / "b.txt").write_text("b")
    text = Text([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert text.num_bytes == 1 + 2 + 3 + 4 + 2 + 1
    for cut in range(text.num_bytes + 1):
        before, after = text.between([0, cut, text.num_bytes])
        assert before + after == "aé日🙂\n\nb"
        assert len(before.encode()) >= cut


def test_a_name_that_was_meant_for_a_file_is_told(tmp_path, model, tokenizer):
    pytest.importorskip("datasets")
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "empty").mkdir()
    for source, message in (
        (f"{tmp_path}/train", "cannot be read.*No such file"),
        (str(tmp_path / "empty"), "a folder, taken for a data set, and the data set"),
    ):
        with pytest.raises(CalibrationError, match=message):
            windows([source], model, tokenizer)
    with pytest.raises(CalibrationError, match=r"it is a folder\. Give its files, as in .*\*\.txt"):
        windows([str(tmp_path), str(tmp_path / "train.txt")], model, tokenizer)
    with pytest.raises(CalibrationError, match="a token file stands alone"):
        windows(["a.safetensors", "b.safetensors"], model, tokenizer)


def test_a_file_of_that_stem_is_proposed(tmp_path, model, tokenizer, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text(TEXT)
    with pytest.raises(CalibrationError, match=r"there is no such file \(did you mean train\.txt\?\), and the data set"):
        windows(["train"], model, tokenizer)


MEMORY = """
import resource, sys
from statprune.data import calibration_windows
from statprune.loading import load_model, load_tokenizer
model, tokenizer = load_model(sys.argv[1]), load_tokenizer(sys.argv[1])
tokenizer("warm up")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
calibration_windows([sys.argv[2]], tokenizer=tokenizer, model=model, samples=64, seqlen=2048)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [4, 100])
def test_a_large_text_takes_little_memory(tmp_path, tiny_model_folder, megabytes):
    (tmp_path / "large.txt").write_text(PROSE * (megabytes * 1_000_000 // len(PROSE.encode())))
    command = [sys.executable, "-c", MEMORY, tiny_model_folder, str(tmp_path / "large.txt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(printed) < 200 * 1024  # KiB
