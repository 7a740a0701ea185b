"""On a GPU: what a CPU gives, within the tolerances that stand here.

`STATPRUNE_TEST_DEVICE=cpu pytest tests/test_cuda.py` runs these tests where there is none, which shows that they are sound.
"""

import copy
import os
import warnings

import pytest
import torch
from lightning import Trainer
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

import statprune
from packed_on_cpu import KERNEL
from statprune import CausalLM, Recipe, StatisticalPruning, checkpoint, streaming
from statprune.acceleration.measuring import DeviceStopwatch, relative_error
from statprune.acceleration.packing import KERNELS, pack_undoably
from statprune.disk.skeleton import open_skeleton
from statprune.loading import load_model
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.progress import unsaid
from statprune.training.modules import WindowDataset
from tiny_models import gpt2, llama, snapshot, t5, tokens

DEVICE = os.environ.get("STATPRUNE_TEST_DEVICE", "cuda")
IS_CUDA = DEVICE.startswith("cuda")
needs_accelerate = pytest.mark.skipif(bool(os.environ.get("STATPRUNE_NO_ACCELERATE")), reason="told to do without accelerate")

pytestmark = pytest.mark.skipif(
    IS_CUDA and not torch.cuda.is_available(), reason="needs a GPU; STATPRUNE_TEST_DEVICE=cpu runs these tests on a CPU"
)

OUT, IN, NUM_TOKENS = 96, 128, 1024
PATTERNS = ["2:4", "4:8", "50%", "37.5%"]
PLAIN = ["magnitude", "wanda", "ria", "z-pruner", "cvr", "cvr+energy", "cvr+activation-energy"]
SOLVED = ["sparsegpt", "optimal-brain", "cvr+least-squares", "default", "fast", "best"]
SCHEDULES = ["walk", "block", "one-shot"]
PACKING = KERNELS if IS_CUDA else (KERNEL,)


def seeded():
    return torch.Generator().manual_seed(0)


def layer(dtype=torch.float32):
    """A weight and inputs with channels of unlike size that are correlated."""
    generator = seeded()
    scale = torch.logspace(-1, 1, IN)
    mixing = torch.eye(IN) + 0.2 * torch.randn(IN, IN, generator=generator) / IN**0.5
    inputs = torch.randn(NUM_TOKENS, IN, generator=generator) @ mixing * scale
    return torch.randn(OUT, IN, generator=generator).to(dtype), inputs


def moments_of(inputs, needs, device):
    moments = InputMoments.zeros(IN, needs & ~Statistic.CURVATURE, device=device).add(inputs.to(device))
    if Statistic.CURVATURE in needs:
        gradients = torch.randn(512, OUT, generator=seeded())
        moments = moments.with_output_gram((gradients.t() @ gradients / 512).to(device))
    return moments


def pruned(method, pattern, dtype, device):
    weight, inputs = layer(dtype)
    pruner = Recipe(method, pattern=pattern).pruner()
    return pruner(weight.to(device), moments_of(inputs, pruner.needs, device) if pruner.needs else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics(dtype):
    """Sums in float64 to 1e-12; a Gram's entry to 1e-6 of the root of the two diagonal entries."""
    inputs = layer()[1].to(dtype).view(8, -1, IN)
    keep = torch.ones(8, inputs.shape[1], dtype=torch.bool)
    keep[2, 5:] = False
    here, there = (
        InputMoments.zeros(IN, Statistic.GRAM, device=one).add(inputs.to(one), keep.to(one)) for one in ("cpu", DEVICE)
    )
    assert there.gram.device.type == torch.device(DEVICE).type
    assert int(there.num_tokens) == int(keep.sum())
    torch.testing.assert_close(there.sum.cpu(), here.sum, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(there.sum_sq.cpu(), here.sum_sq, rtol=1e-12, atol=1e-9)
    root = here.gram.diagonal().sqrt()
    assert float(((there.gram.cpu() - here.gram).abs() / root / root[:, None]).max()) < 1e-6
    assert torch.equal(there.gram, there.gram.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", PLAIN)
def test_what_is_scored_by_channel(method, pattern, dtype):
    """One weight in a thousand may be another one, where two scores are as good as equal; the rest to 1e-5, or a bfloat16."""
    here, there = pruned(method, pattern, dtype, "cpu"), pruned(method, pattern, dtype, DEVICE)
    assert there.weight.device.type == torch.device(DEVICE).type
    keep = there.keep.cpu()
    assert int(keep.sum()) == int(here.keep.sum())
    assert float((keep != here.keep).float().mean()) <= 1e-3
    assert not there.weight.cpu()[~keep].any()
    both = keep & here.keep
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
    torch.testing.assert_close(there.weight.cpu()[both], here.weight[both], **tolerance)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", SOLVED)
def test_what_is_solved_for(method, pattern):
    """Where masks go apart at a tie, so do all later choices: what counts is the error of the outputs, to 1 %."""
    weight, inputs = layer()
    here, there = pruned(method, pattern, torch.float32, "cpu"), pruned(method, pattern, torch.float32, DEVICE)
    keep = there.keep.cpu()
    assert int(keep.sum()) == int(here.keep.sum())
    assert not there.weight.cpu()[~keep].any()
    errors = [float(((inputs @ (one.weight.cpu() - weight).t()).square()).sum()) for one in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("target", ["pruned", "dense"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_a_model(make, schedule, target):
    """Output errors to 1 %, and where each weight lies."""
    dense, batches = make(), [tokens(2, 12), tokens(2, 9)]
    if make is t5:
        batches = [{"input_ids": one, "decoder_input_ids": one[:, :5]} for one in batches]
    recipe = Recipe("optimal-brain+least-squares", pattern="50%", schedule=schedule, target=target)
    reports = []
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(dense).to(device)
        moved = [tree_map(lambda tensor, device=device: tensor.to(device), one) for one in batches]
        reports.append(statprune.prune(model, moved, recipe))
        assert {parameter.device.type for parameter in model.parameters()} == {torch.device(device).type}
    here, there = reports
    assert [site.sparsity for site in there.sites] == [site.sparsity for site in here.sites]
    for one, other in zip(there.sites, here.sites, strict=True):
        assert one.output_error == pytest.approx(other.output_error, rel=0.01, abs=1e-5)


@pytest.mark.parametrize("method", ["best", "sparsegpt"])
def test_perplexity_after_pruning(method):
    dense, windows = llama(), tokens(6, 16)
    found = []
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(dense).to(device)
        statprune.prune(model, windows.to(device).split(2), method, pattern="2:4")
        found.append(statprune.evaluate(model, windows, batch_size=2))
    assert found[1] == pytest.approx(found[0], rel=0.01)


@pytest.mark.parametrize("then", ["stop", "finetune"])
def test_the_callback_in_mixed_precision(then):
    module = CausalLM(llama().train(), learning_rate=1e-3)
    loader = DataLoader(WindowDataset(tokens(12, 16)), batch_size=4)
    callback = StatisticalPruning("default", calibration=loader, then=then)
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="gpu" if IS_CUDA else "cpu", devices=1, precision="bf16-mixed", max_epochs=1, callbacks=[callback], **quiet
    )
    trainer.fit(module, loader, loader)
    named = dict(module.model.named_parameters())
    for site in callback.report.sites:
        weight = named[site.parameter.removeprefix("model.")] if site.parameter not in named else named[site.parameter]
        assert float((weight == 0).float().mean()) == 0.5
        assert bool(((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())
        assert bool(torch.isfinite(weight).all())


def stream(folder, batches, recipe, output, **settings):
    skeleton = open_skeleton(str(folder), device=DEVICE)
    inputs = bind_batches(skeleton.model, batches)
    layers = find_layers(skeleton.model, inputs)
    with checkpoint.reserve(output, resumes=True, say=unsaid) as place:
        report, stored_in = streaming.prune_streamed(skeleton, layers, inputs, recipe, place, max_shard_size="9KB", **settings)
        checkpoint.finish(skeleton.model, report, place, stored_in, source=folder)


@needs_accelerate
@pytest.mark.parametrize("method", ["wanda", "cvr+energy", "sparsegpt", "default", "best"])
def test_streamed_is_to_the_bit_what_it_is_in_memory(tmp_path, method):
    torch.manual_seed(1)
    batches = [tokens(2, 12) for _ in range(3)]
    llama(tie_word_embeddings=False, num_key_value_heads=2).bfloat16().save_pretrained(
        tmp_path / "dense", max_shard_size="12KB"
    )
    recipe = Recipe(method, pattern="2:4")
    model = load_model(str(tmp_path / "dense"), device=DEVICE)
    statprune.prune(model, [one.to(DEVICE) for one in batches], recipe)
    stream(tmp_path / "dense", batches, recipe, tmp_path / "out")
    statprune.verify(tmp_path / "out")
    found, wanted = snapshot(load_model(str(tmp_path / "out"))), snapshot(model)
    assert all(torch.equal(found[name], wanted[name].cpu()) for name in wanted)


@needs_accelerate
@pytest.mark.parametrize(("method", "schedule"), [("wanda", "walk"), ("default", "block")])
def test_wherever_values_wait_the_bits_are_the_same(tmp_path, method, schedule):
    recipe = Recipe(method, pattern="2:4", schedule=schedule)
    batches = [tokens(2, 12) for _ in range(3)]
    llama(tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path / "dense", max_shard_size="12KB")
    found = []
    for values in ("device", "host", "disk"):
        stream(tmp_path / "dense", batches, recipe, tmp_path / values, values=values)
        found.append(snapshot(load_model(str(tmp_path / values))))
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


@needs_accelerate
@pytest.mark.skipif(not IS_CUDA, reason="takes two kinds of devices")
def test_a_model_that_is_spread_over_two_devices():
    from accelerate import dispatch_model

    whole, spread = llama(tie_word_embeddings=False).to(DEVICE), llama(tie_word_embeddings=False)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    spread = dispatch_model(spread, {**places, "model.norm": 0, "lm_head": 0}, main_device=0)
    batches = [tokens(2, 12).to(DEVICE)]
    for model in (whole, spread):
        statprune.prune(model, batches, "default", pattern="2:4")
    with torch.no_grad():
        torch.testing.assert_close(spread(batches[0]).logits, whole(batches[0]).logits, rtol=1e-4, atol=1e-5)


def test_tf32_changes_no_statistic():
    inputs = layer()[1]
    before = torch.get_float32_matmul_precision()
    grams = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            grams.append(moments_of(inputs, Statistic.GRAM, DEVICE).gram)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(*grams)


@pytest.mark.skipif(not IS_CUDA, reason="a CPU has no host to wait for")
@pytest.mark.parametrize("needs", [Statistic.MOMENTS, Statistic.GRAM], ids=str)
def test_collecting_does_not_wait_for_the_host(needs):
    inputs = layer()[1].to(DEVICE)
    moments = InputMoments.zeros(IN, needs, device=DEVICE).add(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moments.add(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not IS_CUDA, reason="a CPU has no host to wait for")
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("method", ["wanda", "cvr+energy"])
def test_pruning_waits_for_the_host_only_to_check(method, pattern):
    """Scores that are NaN are refused, which takes one answer from the device for a weight, and the ties of a row another."""
    weight, inputs = layer()
    pruner, moments = Recipe(method, pattern=pattern).pruner(), moments_of(inputs, Statistic.MOMENTS, DEVICE)
    weight = weight.to(DEVICE)
    pruner(weight, moments)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        pruner(weight, moments)
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in waits if "synchroniz" in str(one.message)]) <= 4


def kernels_that_run(weight):
    """The names of the kernels of this GPU, with what they packed and its unpacking; a GPU runs one of them at least."""
    found = {}
    for kernel in PACKING:
        try:
            packed = pack_undoably(kernel, weight)
            torch.nn.functional.linear(weight[:1], packed[0])
            found[kernel] = packed
        except RuntimeError as e:
            warnings.warn(f"{kernel.name}: {e}", stacklevel=1)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("default")
def test_packed_weights_come_back_and_multiply(dtype):
    weight = pruned("magnitude", "2:4", dtype, DEVICE).weight
    weight[0, 0], weight[1] = -0.0, 0.0
    kernels = kernels_that_run(weight)
    assert kernels
    for packed, unpack in kernels.values():
        assert torch.equal(unpack(packed).view(torch.int16), weight.view(torch.int16))
        for shape in ((1, 1, IN), (1, 7, IN), (3, 5, IN), (1, 64, IN)):
            inputs = torch.randn(shape, dtype=dtype, device=DEVICE)
            for bias in (None, torch.randn(OUT, dtype=dtype, device=DEVICE)):
                expected = torch.nn.functional.linear(inputs, weight, bias)
                found = torch.nn.functional.linear(inputs, packed, bias)
                assert found.shape == expected.shape
                assert relative_error(found, expected) < 0.01


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("default")
def test_an_accelerated_model(compiled):
    """The times are the device's own, and what they say is not tested: any layer is fast enough, so that all are packed."""

    class Lenient(DeviceStopwatch):
        def layer(self, *args):
            found = super().layer(*args)
            found.dense = dict.fromkeys(found.dense, float("inf"))
            return found

        def forward(self, run):
            super().forward(run)
            return passes.pop(0)

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    model, passes = llama(**sizes).bfloat16().to(DEVICE), [2, 2, 1, 1]
    statprune.prune(model, tokens(4, 16).to(DEVICE).split(2), "magnitude", pattern="2:4")
    inputs, before = tokens(2, 9).to(DEVICE), snapshot(model)
    with torch.no_grad():
        expected = model(inputs).logits
    done = statprune.accelerate(model, [1, 24], kernels=PACKING, stopwatch=Lenient(torch.device(DEVICE)))
    assert len(done.report.accelerated) == 14, str(done)
    with torch.no_grad():
        forward = torch.compile(model, backend="inductor" if IS_CUDA else "aot_eager") if compiled else model
        assert relative_error(forward(inputs).logits, expected) < 0.05
    assert model.generate(inputs, max_new_tokens=4, do_sample=False).shape == (2, 13)
    done.undo()
    assert all(torch.equal(one, before[name]) for name, one in snapshot(model).items())
    print(done)
