"""Every promise of a saved folder is broken once, and `verify` names it; and what breaks no promise passes."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import statprune
from statprune import Recipe
from statprune.checkpoint import save
from statprune.errors import CheckpointError
from statprune.loading import load_model, load_tokenizer
from statprune.methods.patterns import Unstructured
from statprune.record import INDEX, RECORD, file_digest, write_record
from statprune.report import PruningReport
from statprune.verification import verify

BATCHES = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))]
UP = "model.layers.0.mlp.up_proj.weight"


def saved(tiny_model_folder, output, *, pattern="2:4", **settings):
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES, Recipe(pattern=pattern))
    return save(model, report, output, tokenizer=load_tokenizer(tiny_model_folder), source=tiny_model_folder, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_folder):
    return saved(tiny_model_folder, tmp_path_factory.mktemp("whole") / "sparse")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny_model_folder):
    return saved(tiny_model_folder, tmp_path_factory.mktemp("sharded") / "sparse", max_shard_size="4KB")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def read(folder, name=RECORD):
    return json.loads((folder / name).read_text())


def seal(folder, names=None):
    """What an attacker would do who knows about digests: take those of the files anew, and that of the record."""
    record = read(folder)
    names = [name for name in names or record["files"] if (folder / name).is_file()]
    write_record(folder, {**record, "files": {name: file_digest(folder / name) for name in names}})


def record(change):
    """Change the record, and give it the digest that it has then."""

    def tamper(folder):
        data = read(folder)
        change(data)
        write_record(folder, data)

    return tamper


def site(**values):
    return record(lambda data: data["sites"][0].update(values))


def top(**values):
    return record(lambda data: data.update(values))


def text(change):
    """Change the record's text and leave its digest."""
    return lambda folder: (folder / RECORD).write_text(change((folder / RECORD).read_text()))


def write(name, content="x"):
    return lambda folder: (folder / name).write_text(content)


def listed(name, content="x"):
    """A further file that the record knows."""

    def tamper(folder):
        (folder / name).write_text(content)
        seal(folder, [*read(folder)["files"], name])

    return tamper


def remove(name):
    return lambda folder: (folder / name).unlink()


def config(**values):
    return lambda folder: (folder / "config.json").write_text(json.dumps({**read(folder, "config.json"), **values}))


def named_file(name):
    return record(lambda data: data["files"].update({name: "0" * 64}))


def sealed(tamper, *without):
    def both(folder):
        tamper(folder)
        seal(folder, [name for name in read(folder)["files"] if name not in without])

    return both


def weights(change):
    def tamper(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return tamper


def revive_one(tensors):
    tensors[UP][tuple((tensors[UP] == 0).nonzero()[0])] = 0.5


def move_a_zero(tensors):
    """The count of zeros stays; a group of four has three weights now."""
    row = tensors[UP].view(32, 4, 4)[0]
    first, second = (row[0] == 0).nonzero()[0], (row[1] != 0).nonzero()[0]
    row[0][first], row[1][second] = row[1][second].clone(), 0.0


def move_to_another_row(tensors):
    """From the first row, which needs it, to the second one, which does not."""
    rows = tensors[UP]
    gone, new = (rows[0] == 0).nonzero()[0], (rows[1] != 0).nonzero()[0]
    rows[0, gone], rows[1, new] = rows[1, new].clone(), 0.0


def scale(tensors):
    tensors[UP] *= 1.001


def rename(tensors):
    tensors["other"] = tensors.pop(UP)


def reshape(tensors):
    tensors[UP] = tensors[UP].view(16, 32)


def flatten(tensors):
    tensors[UP] = tensors[UP].flatten()


def integers(tensors):
    tensors[UP] = (tensors[UP] * 100).round().to(torch.int32)


def touch_another(tensors):
    tensors["model.norm.weight"] += 1


def link_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def add_a_dense_file(folder):
    shutil.copy(folder / "model.safetensors", folder / "dense.safetensors")


def merge_sites(data):
    data["sites"][1] = {**data["sites"][1], "name": data["sites"][0]["name"]}


def nothing_pruned(data):
    data.update(sites=[], sparsity=0.0, energy_ratio=0.0)


def drop_a_site(data):
    del data["sites"][0]


DEEP = "[" * 100_000 + "]" * 100_000

TAMPERINGS = {
    "a zero revived": (weights(revive_one), "number of zeros promised 256, found 255"),
    "a zero moved": (weights(move_a_zero), "pattern promised 2:4"),
    "a weight scaled": (weights(scale), "energy promised"),
    "a tensor renamed": (weights(rename), "promised in model.safetensors as"),
    "a tensor reshaped": (weights(reshape), "shape"),
    "a tensor flattened": (weights(flatten), "shape"),
    "weights of integers": (sealed(weights(integers)), "number of zeros|cannot be checked"),
    "an unpruned tensor changed": (weights(touch_another), r"model.safetensors: SHA-256 promised"),
    "the weights gone": (remove("model.safetensors"), "model.safetensors is promised in pruning.json, but: No such file"),
    "the weights cut": (lambda f: (f / "model.safetensors").write_bytes(b"\x08"), "model.safetensors cannot be read"),
    "the weights a link outside": (link_outside, "is a link to .*outside of the folder"),
    "rope_theta": (config(rope_theta=1.0), "config.json: SHA-256"),
    "number of layers": (config(num_hidden_layers=0), "config.json: SHA-256"),
    "the configuration gone": (remove("config.json"), "config.json is promised"),
    "other weights named": (sealed(config(transformers_weights="dense.safetensors")), "names other weights to load"),
    "a configuration of nothing": (sealed(write("config.json", "[]")), "is no configuration"),
    "a broken configuration": (sealed(write("config.json", "{")), "config.json cannot be read"),
    "generation_config": (write("generation_config.json", "{}"), "generation_config.json: SHA-256"),
    "the tokenizer": (write("tokenizer.json", "{}"), "tokenizer.json: SHA-256"),
    "the tokenizer gone": (remove("tokenizer.json"), "tokenizer.json is promised"),
    "the card": (write("README.md", "# Dense"), "README.md: SHA-256"),
    "a safetensors added": (add_a_dense_file, "'dense.safetensors' is there, but"),
    "a safetensors added and named": (
        lambda f: (add_a_dense_file(f), seal(f, [*read(f)["files"], "dense.safetensors"])),
        "holds dense.safetensors, model.safetensors and no model.safetensors.index.json",
    ),
    "a pickle added": (write("pytorch_model.bin"), "'pytorch_model.bin' is there.*may be loaded"),
    "a pickle added and named": (listed("pytorch_model.bin"), "'pytorch_model.bin', which statprune never writes"),
    "an adapter added": (write("adapter_config.json", "{}"), "'adapter_config.json' is there.*may be loaded"),
    "an adapter added and named": (listed("adapter_config.json", "{}"), "names the file 'adapter_config.json'"),
    "code added": (write("modeling_x.py"), "'modeling_x.py' is there"),
    "code added and named": (listed("modeling_x.py"), "names the file 'modeling_x.py'"),
    "a text added": (write("notes.txt"), "'notes.txt' is there"),
    "a folder added": (lambda f: (f / "more").mkdir(), "'more' is there"),
    "an index of pickles": (listed("pytorch_model.bin.index.json", "{}"), "expected no index of weights but"),
    "an index beside one file": (listed(INDEX, '{"weight_map": {}}'), "and model.safetensors.index.json both"),
    "a file above": (named_file("../x"), r"names the file '\.\./x': expected a name inside"),
    "a file elsewhere": (named_file("/etc/passwd"), "names the file '/etc/passwd'"),
    "a file in a folder": (named_file("more/x"), "names the file 'more/x'"),
    "a file of Windows": (named_file("..\\x"), "names the file"),
    "a drive": (named_file("C:x"), "names the file"),
    "the folder itself": (named_file(".."), "names the file"),
    "no name": (named_file(""), "names the file ''"),
    "a name of control characters": (named_file("a\x1b[31m"), "names the file"),
    "the record in itself": (named_file(RECORD), "which statprune never writes"),
    "no files": (top(files={}), "contradicts itself: .*file: expected a \\*.safetensors with a digest"),
    "files as a list": (top(files=[]), "damaged"),
    "no digest of a file": (record(lambda d: d["files"].update({"config.json": "abc"})), "has no SHA-256 digest"),
    "a site's file above": (site(file="../sparse/model.safetensors"), "contradicts itself.*file: expected"),
    "a site's file elsewhere": (site(file="/tmp/model.safetensors"), "contradicts itself.*file: expected"),
    "a site's file no weights": (site(file="config.json"), "contradicts itself.*file: expected"),
    "a site's tensor another": (site(tensor="model.norm.weight"), "shape"),
    "no sites": (record(nothing_pruned), "contradicts itself: sites: weights that were pruned: expected at least one"),
    "a site dropped": (record(drop_a_site), "contradicts itself: all weights together"),
    "a site twice": (record(merge_sites), "named twice"),
    "the pattern 4:4": (record(lambda d: d["recipe"]["pattern"].update(keep=4)), r"pruned weights with 4:4: expected 0, found"),
    "another width of the pattern": (record(lambda d: d["recipe"]["pattern"].update(keep=3, of=5)), "which it does not fit"),
    "no protocol": (record(lambda d: d.pop("protocol")), "damaged: KeyError: 'protocol'"),
    "a protocol of words": (top(protocol="c4"), "damaged: TypeError: protocol is a str"),
    "a recipe of nothing": (top(recipe=None), "damaged: TypeError: recipe is a NoneType"),
    "nothing for what is left out": (record(lambda d: d["left_out"].append({})), "damaged: KeyError: 'name'"),
    "a number for a reason": (record(lambda d: d["left_out"][0].update(reason=1)), "damaged: TypeError: left_out"),
    "no such pattern": (record(lambda d: d["recipe"].update(pattern={"name": "mine"})), "damaged: KeyError"),
    "an impossible pattern": (record(lambda d: d["recipe"]["pattern"].update(keep=9)), "damaged: ValueError"),
    "a pattern of texts": (record(lambda d: d["recipe"].update(pattern="2:4")), "damaged"),
    "a pattern of fractions": (record(lambda d: d["recipe"]["pattern"].update(of=4.0)), r"damaged: ValueError: NM\(of=4.0\)"),
    "nothing pruned": (site(num_pruned=0), "number of pruned weights with 2:4: expected 128, found 0"),
    "more pruned than zero": (site(num_zeros=100), "number of zeros: expected 128 to 256, found 100"),
    "more zeros than weights": (site(num_zeros=10**6), "number of zeros: expected 128 to 256, found 1000000"),
    "zeros that are true": (site(num_zeros=True), "is True, no count"),
    "a fraction of a zero": (site(num_zeros=128.0), "no count"),
    "a site's sparsity": (site(sparsity=0.6), r"sparsity: expected 0\.6, found 0\.5"),
    "a site's energy": (site(energy_after=-1.0), "energy_after: expected 0 or more"),
    "a negative shape": (site(shape=[-16, -16]), "no count"),
    "an empty shape": (site(shape=[0, 16]), "a weight of no numbers"),
    "a shape of one": (site(shape=[256]), "damaged"),
    "another layout": (site(stored="sideways"), "stored 'sideways'"),
    "a layer of control characters": (site(name="a\x1b[2J"), "name of a weight"),
    "the total sparsity": (top(sparsity=0.6), r"all weights together: sparsity: expected 0\.6, found 0\.5"),
    "a sparsity above 1": (top(sparsity=1.5), "all weights together: sparsity"),
    "a sparsity in words": (top(sparsity="half"), "no finite number"),
    "the energy ratio": (top(energy_ratio=0.0), "all weights together: energy_ratio"),
    "format 1": (top(format=1), "is of format 1, which has no digest of what lies beside the weights.*Prune the model anew"),
    "a later format": (top(format=99), "is of format 99, and this version of statprune knows format 2"),
    "no format": (record(lambda d: d.pop("format")), "is of format None"),
    "what was rescued": (top(unfinished="the disk was full."), "is not an output but what could be rescued of one: the disk"),
    "no record": (remove(RECORD), "has no readable pruning.json"),
    "the record a folder": (lambda f: ((f / RECORD).unlink(), (f / RECORD).mkdir()), "pruning.json is no file"),
    "an empty record": (write(RECORD, ""), "has no readable pruning.json"),
    "a list for a record": (write(RECORD, "[]"), "is of format None"),
    "a record of bytes": (lambda f: (f / RECORD).write_bytes(b"\xff\xfe{}"), "has no readable pruning.json"),
    "a record without digest": (write(RECORD, '{"format": 2}'), "damaged: KeyError: 'digest'"),
    "nested deep": (write(RECORD, DEEP), "nested too deep"),
    "nested deep inside": (text(lambda t: t.replace('"protocol": {}', f'"protocol": {DEEP}')), "nested too deep"),
    "NaN": (text(lambda t: t.replace('"sparsity": 0.5', '"sparsity": NaN')), "NaN is no number that JSON has"),
    "infinity": (text(lambda t: t.replace('"sparsity": 0.5', '"sparsity": Infinity')), "Infinity is no number"),
    "too large": (text(lambda t: t.replace('"sparsity": 0.5', '"sparsity": 1e999')), "1e999 is too large"),
    "a huge number": (text(lambda t: t.replace('"format": 2', '"format": 2' + "0" * 5000)), "a number of 5001 digits"),
    "a key twice": (text(lambda t: t.replace('"format": 2', '"format": 2, "format": 2')), "'format' stands there twice"),
    "one digit": (text(lambda t: t.replace('"num_batches": 1', '"num_batches": 2')), "was changed after it was written"),
    "its digest": (text(lambda t: t.replace('"digest": "', '"digest": "0')), "was changed after it was written"),
}  # fmt: skip


def index(change):
    def tamper(folder):
        data = read(folder, INDEX)
        change(data["weight_map"])
        (folder / INDEX).write_text(json.dumps(data))

    return tamper


def all_dense(folder):
    """The worst: every tensor is loaded from a file that was added."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file(tensors, folder / "dense.safetensors", metadata={"format": "pt"})
    index(lambda found: found.update(dict.fromkeys(found, "dense.safetensors")))(folder)


def all_dense_and_named(folder):
    all_dense(folder)
    seal(folder, [*read(folder)["files"], "dense.safetensors"])


def another_shard(found):
    found[UP] = next(name for name in found.values() if name != found[UP])


SHARDED_TAMPERINGS = {
    "all from a dense file": (all_dense, "'dense.safetensors' is there"),
    "all from a dense file that is named": (all_dense_and_named, "is in dense.safetensors and in model-"),
    "the index gone": (remove(INDEX), "index.json is promised"),
    "no index": (sealed(remove(INDEX), INDEX), "and no model.safetensors.index.json"),
    "an entry gone": (sealed(index(lambda found: found.pop(UP))), "up_proj.weight is in no file, and it is in model-"),
    "an entry changed": (index(another_shard), "says that .*up_proj.weight is in"),
    "an entry in another shard": (sealed(index(another_shard)), "says that .*up_proj.weight is in"),
    "an entry elsewhere": (sealed(index(lambda found: found.update({UP: "../x.safetensors"}))), "is in ../x.safetensors"),
    "an entry of nothing": (sealed(index(lambda found: found.update(more="model.safetensors"))), "and it is in none"),
    "no map": (sealed(write(INDEX, "{}")), "has no weight_map"),
    "a list for an index": (sealed(write(INDEX, "[]")), "has no weight_map"),
    "a broken index": (sealed(write(INDEX, "{")), "index.json cannot be read"),
    "an index nested deep": (sealed(write(INDEX, DEEP)), "index.json cannot be read"),
    "an entry twice": (sealed(write(INDEX, '{"weight_map": {}, "weight_map": {}}')), "stands there twice"),
    "one file as well": (listed("model.safetensors"), "both, and which of them is loaded is not said"),
    "a shard gone": (lambda f: min(f.glob("model-0*")).unlink(), "is promised in pruning.json, but"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_is_tampered_with_is_found_and_named(copy, name):
    tamper, message = TAMPERINGS[name]
    tamper(copy)
    with pytest.raises(CheckpointError, match=message):
        verify(copy)


@pytest.mark.parametrize("name", SHARDED_TAMPERINGS)
def test_what_is_loaded_by_an_index_is_what_the_record_names(sharded, tmp_path, name):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    verify(folder)
    tamper, message = SHARDED_TAMPERINGS[name]
    tamper(folder)
    with pytest.raises(CheckpointError, match=message):
        verify(folder)


def test_a_record_of_64_mebibytes_is_not_read(copy):
    with (copy / RECORD).open("r+") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(CheckpointError, match="67,108,865 bytes, expected at most"):
        verify(copy)


def test_what_git_and_the_hub_put_beside_a_model_is_no_harm(copy):
    for name in (".git", ".cache"):
        (copy / name).mkdir()
        (copy / name / "anything").write_text("x")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    verify(copy)


def test_a_snapshot_in_the_cache_of_the_hub_can_be_verified(copy, tmp_path):
    home = tmp_path / "models--user--name"
    snapshot, blobs = home / "snapshots" / "0123abcd", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in copy.iterdir():
        path.rename(blobs / file_digest(path)) if (digest := file_digest(path)) else None
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    verify(snapshot)
    shutil.move(blobs, tmp_path / "blobs")
    for path in snapshot.iterdir():
        target = tmp_path / "blobs" / path.readlink().name
        path.unlink()
        path.symlink_to(target)
    with pytest.raises(CheckpointError, match="outside of the folder"):
        verify(snapshot)


def test_a_published_digest_is_compared(copy):
    digest = verify(copy)["digest"]
    assert verify(copy, digest=f" {digest.upper()}\n")["digest"] == digest
    record(lambda data: data["protocol"].update(seed=1))(copy)
    verify(copy)
    with pytest.raises(CheckpointError, match="is not the record that was published"):
        verify(copy, digest=digest)


def test_another_layout_of_the_same_record_changes_nothing(copy):
    data = read(copy)
    (copy / RECORD).write_text(json.dumps(dict(reversed(data.items())), indent=4))
    assert verify(copy) == data


def test_verifying_imports_neither_transformers_nor_lightning():
    code = "import sys, statprune.verification; print(*{'transformers', 'lightning', 'huggingface_hub'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_two_thousand_random_flips_are_caught_but_those_that_change_nothing(request, tmp_path, kind):
    """What changes nothing that loads: white space in the record, where it says the same."""
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    names, choose, harmless = sorted(path.name for path in folder.iterdir()), random.Random(0), 0
    record = read(folder)
    for _ in range(1000):
        path = folder / choose.choice(names)  # each file as often, however small
        original = path.read_bytes()
        changed, place = bytearray(original), choose.randrange(len(original))
        changed[place] ^= 1 << choose.randrange(8) if choose.random() < 0.5 else choose.randrange(1, 256)
        path.write_bytes(changed)
        try:
            verify(folder)
        except CheckpointError:
            pass
        else:
            assert path.name == RECORD
            assert json.loads(changed) == record
            harmless += 1
        path.write_bytes(original)
    verify(folder)
    assert harmless < 20


@pytest.fixture
def rounded_in_rows(tiny_model_folder, tmp_path, monkeypatch):
    """70 % by row as earlier versions had it: 11 of 16 weights in each row, and 22 of 32."""
    with monkeypatch.context() as earlier:
        earlier.setattr(Unstructured, "pruned_of", lambda pattern, rows, columns: rows * int(pattern.sparsity * columns))
        return saved(tiny_model_folder, tmp_path / "old", pattern="70%")


def test_a_folder_that_was_rounded_down_in_each_row_holds_what_it_promised(rounded_in_rows, tmp_path):
    found = verify(rounded_in_rows)
    number = {(16, 16): 16 * 11, (8, 16): 8 * 11, (32, 16): 32 * 11, (16, 32): 16 * 22}
    assert {tuple(site["shape"]): site["num_pruned"] for site in found["sites"]} == number
    # and so does what is made of it
    again = save(load_model(rounded_in_rows), PruningReport.from_dict(found), tmp_path / "again")
    assert verify(again)["sparsity"] == found["sparsity"]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (site(num_pruned=16 * 11 + 1), "number of pruned weights with 70%: expected 179, found 177"),
        (sealed(weights(move_to_another_row)), "pattern promised 352 weights, by row"),
    ],
)
def test_a_folder_that_was_rounded_down_in_each_row_promises_no_less(rounded_in_rows, tamper, message):
    tamper(rounded_in_rows)
    with pytest.raises(CheckpointError, match=message):
        verify(rounded_in_rows)


def test_a_folder_has_exactly_the_zeros_asked_for(tiny_model_folder, tmp_path):
    found = verify(saved(tiny_model_folder, tmp_path / "new", pattern="70%"))
    number = {(16, 16): 179, (8, 16): 89, (32, 16): 358, (16, 32): 358}
    assert {tuple(site["shape"]): site["num_pruned"] for site in found["sites"]} == number
