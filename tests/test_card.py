"""The model card, and the hub: what is said of a model there, and what is uploaded."""

import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

import statprune
from statprune import Recipe
from statprune.card import hub_name
from statprune.checkpoint import save
from statprune.errors import CheckpointError
from statprune.hub import push
from statprune.loading import load_model
from statprune.record import RECORD
from statprune.verification import verify
from tiny_models import classifier

BATCHES = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))]
PROTOCOL = {"model": "/home/me/tiny", "calibration": ["/home/me/text.txt", "c4"], "samples": 2, "seqlen": 16, "seed": 0}
EVALUATION = {"dense": 10.5, "pruned": 11.25, "text": ["/home/me/held-out.txt"], "seqlen": 16, "windows": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_folder):
    home = tmp_path_factory.mktemp("card")
    source = shutil.copytree(tiny_model_folder, home / "tiny")
    (source / "README.md").write_text("---\nlicense: llama3\nlanguage: [en, de]\ntags: [theirs]\n---\n# Tiny\n")
    model = load_model(str(source))
    report = statprune.prune(model, BATCHES, Recipe("cvr+least-squares+energy", "2:4"))
    report.perplexity = EVALUATION
    return save(model, report, home / "sparse", source=source, protocol=PROTOCOL)


def test_the_card_has_the_metadata_of_the_hub(folder):
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data == {
        "license": "llama3", "language": ["en", "de"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["pruned", "sparse", "statprune"],
    }  # fmt: skip


def test_the_card_says_what_was_done_how_good_it_is_and_how_to_do_it_again(folder, tmp_path):
    card = (folder / "README.md").read_text()
    for text in (
        "| pattern | 2:4 |",
        "| dense | 10.5000 |",
        "| pruned | 11.2500 |",
        "Measured on held-out.txt, in windows of 16",
    ):
        assert text in card
    assert "50.00 % zeros" in card
    assert "least-squares" in card
    assert "--calibration text.txt c4 --samples 2 --seqlen 16 --seed 0" in card
    assert "/home/me" not in card
    (tmp_path / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == Recipe("cvr+least-squares+energy", "2:4")
    assert verify(folder)["perplexity"] == EVALUATION


def test_a_model_of_the_hub_is_named_as_the_base(tmp_path, tiny_model_folder):
    model = load_model(tiny_model_folder)
    save(model, statprune.prune(model, BATCHES, Recipe(pattern="50%")), tmp_path / "out", source="some/tiny")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("some/tiny", "finetune")
    assert "license" not in data


@pytest.mark.parametrize(
    "text", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: {a: 1}\n---\n", "\xff", "no metadata"]
)
def test_a_card_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    model = classifier()
    record = verify(save(model, statprune.prune(model, [torch.randn(4, 8)]), tmp_path / "out", source=tmp_path))
    assert record["base"] == {"class": "Sequential", "library": "pytorch"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("/cache/hub/models--meta-llama--Llama-3.2-1B/snapshots/0123abcd", "meta-llama/Llama-3.2-1B"),
        ("/home/me/tiny", None),
        ("./some/tiny", None),
        ("tiny", None),
        (None, None),
    ],
)
def test_only_names_of_the_hub_are_published(source, name):
    assert hub_name(source) == name


class Hub:
    """What would have been sent."""

    def __init__(self, fails=None, error=None, holds=()):
        self.calls, self.fails, self.error, self.holds = [], fails, error, holds

    def __call__(self, **_):
        return self

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.fails:
                raise self.error
            return self.holds if name == "list_repo_files" else SimpleNamespace(commit_url="https://hub/commit/1")

        return call


def test_exactly_what_the_record_names_is_uploaded(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / ".gitattributes").write_text("x")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub := Hub())
    told = []
    assert push(copy, "user/name", private=True, say=told.append) == "https://hub/commit/1"
    assert [name for name, *_ in hub.calls] == ["whoami", "create_repo", "list_repo_files", "upload_folder"]
    assert hub.calls[1][1:] == (("user/name",), {"private": True, "exist_ok": True})
    sent = hub.calls[3][2]
    assert sent["repo_id"] == "user/name"
    assert sent["folder_path"] == copy
    assert set(sent["allow_patterns"]) == {*verify(copy)["files"], RECORD}
    assert len(told) == 1


def test_a_repository_that_holds_other_files_is_refused(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(holds=[".gitattributes", "README.md", "dense.safetensors"]))
    with pytest.raises(CheckpointError, match=r"holds dense\.safetensors, which is no part of"):
        push(folder, "user/name")


def test_nothing_is_uploaded_where_a_promise_is_broken(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("# Dense")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub := Hub())
    with pytest.raises(CheckpointError, match=r"README\.md: SHA-256"):
        push(copy, "user/name")
    assert hub.calls == []


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("fails", "error", "message"),
    [
        ("whoami", LocalTokenNotFoundError("Token is required"), "Token is required .*hf auth login"),
        (
            "create_repo",
            HfHubHTTPError("403 Forbidden", response=RESPONSE),
            "403 Forbidden .*push it again with `statprune push",
        ),
        ("upload_folder", OSError("Connection reset"), "Connection reset .*push it again"),
    ],
)
def test_an_error_of_the_hub_is_explained(folder, monkeypatch, fails, error, message):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(fails, error))
    with pytest.raises(CheckpointError, match=message):
        push(folder, "user/name")


def test_saving_can_push_and_asks_before_it_writes_whether_it_may(tmp_path, tiny_model_folder, monkeypatch):
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub("whoami", LocalTokenNotFoundError("Token is required")))
    with pytest.raises(CheckpointError, match="Token is required"):
        save(model, report, tmp_path / "out", push_to_hub="user/name")
    with pytest.raises(CheckpointError, match=r"The repository 'a/b/c': expected USER/NAME"):
        save(model, report, tmp_path / "out", push_to_hub="a/b/c")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(huggingface_hub, "HfApi", hub := Hub("upload_folder", OSError("Connection reset")))
    with pytest.raises(CheckpointError, match="the folder is whole"):
        save(model, report, tmp_path / "out", push_to_hub="user/name")
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == verify(tmp_path / "out")
    hub.fails = None
    save(model, report, tmp_path / "out", push_to_hub="user/name", overwrite=True)
    assert hub.calls[-1][0] == "upload_folder"
