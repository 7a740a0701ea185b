"""Where a parameter was saved, by its name or by its content."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from statprune.disk import finding
from statprune.disk.finding import Saved
from statprune.errors import CheckpointError


def saved(folder, *files):
    for index, tensors in enumerate(files):
        save_file(tensors, folder / f"model-{index}.safetensors")
    return Saved(folder)


def test_a_name_goes_before_content_and_content_before_nothing(tmp_path):
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    with saved(tmp_path, {"a": one.clone(), "b": one.clone()}, {"c": other}) as places:
        assert places.find("b", one) == ("model-0.safetensors", "b")
        assert places.find("elsewhere", one) == ("model-0.safetensors", "a")
        assert places.find("b", other) == ("model-1.safetensors", "c")  # what has its name is another one
        with pytest.raises(CheckpointError, match=r"^d was saved under no name, in none of model-0.*, model-1.*\.$"):
            places.find("d", one.T.contiguous())
        with pytest.raises(CheckpointError, match="a was saved under no name"):
            places.find("a", one.double())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), st.booleans())
def test_each_is_found_where_a_search_of_all_finds_it(tmp_path_factory, count, seed, dtype, looks_alike):
    """Sparse and small, so that many look alike, and some are the same."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{index}": torch.randint(0, 2, (3, 2), generator=generator).to(dtype).reshape((3, 2) if index % 3 else (2, 3))
        for index in range(count)
    }
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "_LOOKED_AT", 2 if looks_alike else 256)
        with saved(folder, tensors) as places:
            for weight in tensors.values():
                found = places.find("unknown", weight)[1]
                same = [name for name, one in tensors.items() if one.shape == weight.shape and torch.equal(one, weight)]
                assert found in same


def test_each_saved_tensor_is_read_a_few_times_however_many_are_asked_for(tmp_path, monkeypatch):
    tensors = {f"saved.{index}": torch.randn(4, 4) for index in range(40)}
    places, reads = saved(tmp_path, tensors), []
    read = Saved._read
    monkeypatch.setattr(Saved, "_read", lambda self, name: reads.append(name) or read(self, name))
    with places:
        for index in range(40):
            assert places.find(f"own.{index}", tensors[f"saved.{index}"]) == ("model-0.safetensors", f"saved.{index}")
    assert len(reads) == 2 * 40  # one look at each, one comparison for each
