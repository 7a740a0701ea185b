"""`StatisticalPruning` under Lightning's ModelParallelStrategy: two ranks, with weights that FSDP2 shards, beside DDP's whole ones.

Both give the ranks the same batches, and with two of them every sum over ranks is the same whatever its order. So weights are
equal bit for bit.
"""

import re

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import statprune
from statprune import CausalLM, Recipe, StatisticalPruning
from statprune.checkpoint import verify
from statprune.errors import MaskError, NonFiniteError, RanksError, SiteError
from statprune.loading import load_model
from statprune.training.modules import WindowDataset
from test_callback import TOKENS, Classifier, LostDisk, classifier_data, sparsity, tiny_llama, trainer
from test_sharded import batches, sharded_llama, whole

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]
RECIPE = Recipe("paper", "2:4")


class ShardedLM(CausalLM):
    def configure_model(self):
        if any(isinstance(one, DTensor) for one in self.parameters()):
            return
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class ShardedClassifier(Classifier):
    def configure_model(self):
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


def language_model(is_sharded, seed=0):
    return (ShardedLM if is_sharded else CausalLM)(tiny_llama(seed), learning_rate=1e-2)


def data(shuffle=False, kind=WindowDataset):
    return DataLoader(kind(TOKENS), batch_size=4, shuffle=shuffle)


def pruning(**settings):
    return StatisticalPruning(RECIPE, **{"calibration": data(), **settings})


def on_two_ranks(is_sharded, *callbacks, is_full=False, sizes=(2, 1), **settings):
    strategy = ModelParallelStrategy(*sizes, save_distributed_checkpoint=not is_full) if is_sharded else "ddp"
    return trainer(*callbacks, devices=2, strategy=strategy, **settings)


def copied(module):
    return {name: one.clone() for name, one in whole(module).items()}


def equal(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(one, others[name]) for name, one in weights.items())


def metrics_of(run):
    return {name: value.item() for name, value in run.callback_metrics.items()}


def refusal(run, verb, module, *loaders, kind=SiteError, **settings):
    with pytest.raises(kind) as caught:
        getattr(run, verb)(module, *loaders, **settings)
    return str(caught.value)


class TrainedWeights(Callback):
    """Stands before the pruning callback, so it sees what training left."""

    def on_train_end(self, trainer, pl_module):
        self.weights = copied(pl_module)


class Watch(Callback):
    """Looks at the zeros after every batch."""

    def __init__(self):
        self.zeros, self.steps, self.is_held = {}, 0, True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = {name: one == 0 for name, one in copied(pl_module).items() if "proj" in name}
        self.zeros, self.steps = self.zeros or now, trainer.global_step
        self.is_held = self.is_held and equal(self.zeros, now)


def _validated(rank, folder):
    found = {}
    for is_sharded in (False, True):
        module, callback = language_model(is_sharded), pruning(output=f"{folder}/{is_sharded}")
        run = on_two_ranks(is_sharded, callback)
        run.validate(module, data(), verbose=False)
        first = metrics_of(run)
        run.validate(module, data(), verbose=False)
        found[is_sharded] = copied(module), first, metrics_of(run), [site.num_zeros for site in callback.report.sites]
    return equal(found[True][0], found[False][0]), found[True][1:], found[False][1:], found[True][0]


def test_validate_prunes_and_measures_as_with_whole_weights_and_writes_the_output(two_ranks, tmp_path):
    for is_equal, sharded, expected, _ in (outcomes := two_ranks(_validated, str(tmp_path))):
        assert is_equal
        assert sharded == expected
        assert "dense_perplexity" in sharded[0]
        assert "dense_perplexity" not in sharded[1]
    record, other = verify(tmp_path / "True"), verify(tmp_path / "False")
    assert [site["num_zeros"] for site in record["sites"]] == [site["num_zeros"] for site in other["sites"]]
    assert record["base"] == other["base"]
    reloaded = load_model(str(tmp_path / "True"))
    assert all(torch.equal(one, outcomes[0][3][f"model.{name}"]) for name, one in reloaded.named_parameters())


def _fitted(rank, folder):
    found = {}
    for is_sharded, is_pruned in ((False, True), (True, False), (True, True)):
        module, trained = language_model(is_sharded), TrainedWeights()
        others = [pruning(output=f"{folder}/{is_sharded}", calibration=None)] if is_pruned else []
        logger = TensorBoardLogger(folder) if rank == 0 and is_sharded and is_pruned else False
        run = on_two_ranks(is_sharded, trained, *others, max_epochs=2, num_sanity_val_steps=1, logger=logger, log_every_n_steps=1)
        run.fit(module, data(shuffle=True), data())
        found[is_sharded, is_pruned] = trained.weights, copied(module), metrics_of(run)
    whole_ones, without, probed = (found[key] for key in ((False, True), (True, False), (True, True)))
    return {
        "training": equal(probed[0], without[0]) and equal(probed[0], whole_ones[0]),
        "pruned": equal(probed[1], whole_ones[1]) and not equal(probed[0], probed[1]),
        "metrics": probed[2] == whole_ones[2] and "pruned_output_error" in probed[2],
    }


def test_probes_leave_the_training_as_it_was_and_the_end_prunes_as_with_whole_weights(two_ranks, tmp_path):
    for found in two_ranks(_fitted, str(tmp_path)):
        assert found == dict.fromkeys(found, True)
    assert verify(tmp_path / "True")["sparsity"] == verify(tmp_path / "False")["sparsity"] == 0.5


def _tuned(rank, folder):
    found = {}
    for is_sharded, is_full in ((False, False), (True, False), (True, True)):
        module, watch = language_model(is_sharded), Watch()
        place = f"{folder}/{is_sharded}{is_full}"
        checkpoint = ModelCheckpoint(place, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        callback = pruning(then="finetune", output=f"{place}/out")
        run = on_two_ranks(
            is_sharded, callback, watch, checkpoint, is_full=is_full, max_epochs=2, enable_checkpointing=True, num_sanity_val_steps=0
        )  # fmt: skip
        run.fit(module, data(), data())
        module_again, again, watch_again = language_model(is_sharded, seed=5), pruning(then="finetune"), Watch()
        resumed = on_two_ranks(is_sharded, again, watch_again, is_full=is_full, max_epochs=2, num_sanity_val_steps=0)
        resumed.fit(module_again, data(), data(), ckpt_path=f"{place}/step=3.ckpt")
        found[is_sharded, is_full] = copied(module), metrics_of(run)
        assert watch.is_held
        assert watch_again.is_held
        assert equal(watch.zeros, watch_again.zeros)
        assert watch.steps == watch_again.steps == 6
        assert sparsity_of(watch.zeros) == 0.5
        assert equal(copied(module_again), copied(module))
        assert again.report.finetuning_steps == callback.report.finetuning_steps == 6
    expected = found[False, False]
    path = f"{folder}/TrueFalse/step=3.ckpt"
    stopping = refusal(on_two_ranks(True, pruning(), max_epochs=2), "fit", language_model(True), data(), data(), kind=MaskError,
                       ckpt_path=path)  # fmt: skip
    return [(equal(weights, expected[0]), metrics == expected[1]) for weights, metrics in found.values()], stopping


def sparsity_of(zeros):
    return sum(int(one.sum()) for one in zeros.values()) / sum(one.numel() for one in zeros.values())


def test_finetuning_holds_the_mask_on_every_part_through_checkpoints_of_both_kinds(two_ranks, tmp_path):
    for found, stopping in two_ranks(_tuned, str(tmp_path)):
        assert found == [(True, True)] * 3
        assert "would train its zeros away" in stopping
    for kind in ("FalseFalse", "TrueFalse", "TrueTrue"):
        record = verify(tmp_path / kind / "out")
        assert (record["finetuning_steps"], record["sparsity"]) == (6, 0.5)


class Diverges(Callback):
    """One weight, in the second rank's part."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weight = pl_module.model.lm_head.weight
        if trainer.global_rank == 1:
            weight.detach().to_local()[-1, -1] = torch.nan


def _failing(rank, folder):
    diverging = on_two_ranks(True, Diverges(), pruning(output=f"{folder}/diverged", probe=False), max_steps=1)
    diverged = refusal(diverging, "fit", language_model(True), data(), data(), kind=NonFiniteError)
    lost = pruning(output=f"{folder}/lost", probe=False, calibration=data(kind=LostDisk if rank == 1 else WindowDataset))
    module = language_model(True)
    failed = refusal(on_two_ranks(True, lost, max_steps=1), "fit", module, data(), data(), kind=(OSError, RanksError))
    return diverged, failed, copied(module)


def test_where_the_end_of_a_training_fails_on_one_rank_the_first_one_keeps_the_trained_weights(two_ranks, tmp_path):
    from safetensors.torch import load_file

    (diverged, failed, weights), (_, own, _) = two_ranks(_failing, str(tmp_path))
    assert re.search(r"NaN or infinity in the parameter lm_head\.weight.*trained weights are in .*diverged\.rescued", diverged)
    assert load_file(tmp_path / "diverged.rescued" / "model.safetensors")["lm_head.weight"][-1, -1].isnan()
    assert re.search(r"rank 1 failed: OSError: the disk is gone.*trained weights are in .*lost\.rescued", failed)
    assert "the disk is gone" in own
    kept = load_file(tmp_path / "lost.rescued" / "model.safetensors")
    assert kept.keys() == {name.removeprefix("model.") for name in weights} | ({"lm_head.weight"} & kept.keys())
    assert all(torch.equal(one, weights[f"model.{name}"]) for name, one in kept.items())


def _any_module(rank):
    found = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        module = (ShardedClassifier if is_sharded else Classifier)()
        callback = StatisticalPruning(Recipe("wanda", "50%"), calibration=classifier_data(), then="finetune")
        run = on_two_ranks(is_sharded, callback, max_epochs=1, num_sanity_val_steps=0)
        run.fit(module, classifier_data(), classifier_data())
        found.append((copied(module), metrics_of(run)))
    return equal(found[0][0], found[1][0]), found[0][1], found[1][1], sparsity_of({"": whole(module)["head.0.weight"] == 0})


def test_a_module_of_anybody_that_is_sharded_as_a_whole(two_ranks):
    for is_equal, expected, sharded, zeros in two_ranks(_any_module):
        assert is_equal
        assert sharded == expected
        assert zeros == 0.5


def _refused(rank):
    class Around(ShardedLM):
        def configure_model(self):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def validating(callback, module, sizes=(2, 1)):
        return refusal(on_two_ranks(True, callback, sizes=sizes), "validate", module, data())

    classifying = StatisticalPruning("best", calibration=classifier_data())
    return {
        "tensor": validating(pruning(), language_model(True), sizes=(1, 2)),
        "around": validating(pruning(), Around(tiny_llama())),
        "search": validating(StatisticalPruning("auto:minutes=1", calibration=data()), language_model(True)),
        "loss": refusal(on_two_ranks(True, classifying), "fit", ShardedClassifier(), classifier_data(), classifier_data()),
    }


def test_what_needs_whole_weights_is_refused_by_name_before_anything_runs(two_ranks):
    for found in two_ranks(_refused):
        assert re.search(r"1 data-parallel x 2 tensor-parallel.*data_parallel_size=2, tensor_parallel_size=1", found["tensor"])
        assert re.search(r"fully_shard was called on the .*Around itself.*around the .*LlamaForCausalLM", found["around"])
        assert re.search(r"The weights are sharded, and 'auto' tries recipes out.* or with DDP", found["search"])
        assert re.search(r"The weights are sharded, and a loss-aware method.*without gradients", found["loss"])


def _allocated(rank):
    messages = []
    for allocation in ("sensitivity", "curves"):
        recipe = {"method": "wanda", "pattern": "50%", "allocation": allocation}
        with pytest.raises(SiteError) as caught:
            statprune.prune(sharded_llama(), batches()[rank::2], recipe)
        messages.append(str(caught.value))
    return messages


def test_allocations_that_run_the_whole_model_are_refused_by_name(two_ranks):
    for messages in two_ranks(_allocated):
        assert all(re.search("sharded, and the allocation .* runs the whole model for each layer", one) for one in messages)
