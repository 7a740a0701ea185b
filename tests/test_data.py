import builtins
import json

import pytest
import torch
from safetensors.torch import save_file

from statprune.data import (
    calibration_windows,
    consecutive_windows,
    evaluation_windows,
    generated_windows,
    random_windows,
    read_text,
    standard_library_text,
    tokenize,
)
from statprune.errors import CalibrationError
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
    documents = [{"text": TEXT * repeats} for repeats in (1, 5, 6, 7, 8)] + [{"text": "short"}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    got = windows([str(tmp_path)], model, tokenizer, samples=4, seqlen=32)
    assert got.shape == (4, 32)
    with pytest.raises(CalibrationError, match="4 documents longer than 32 tokens, wanted: 9"):
        windows([str(tmp_path)], model, tokenizer, samples=9, seqlen=32)
    with pytest.raises(CalibrationError, match="has the columns text, not 'body'"):
        windows([f"{tmp_path}:::body"], model, tokenizer)


def test_a_name_that_is_neither_file_nor_data_set_says_what_to_give(model, tokenizer):
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match=r"no-such-set is no file, and the data set .* Give text files, or `generated`"):
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
