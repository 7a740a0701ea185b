"""Figures of a GPU: what pruning a LLaMA-2-7B block takes, the walk beside a plain forward pass, streaming, and 2:4's speed.

    python configs/gpu_check.py --output gpu.json
    python configs/gpu_check.py --output cpu.json --small        on a CPU, to see that it works

`gpu_check.sh` runs the tests too. The JSON is written anew after every measurement, so that one that is ended early has what
was measured until then. A time is the least of several runs after one that is not counted; memory is what torch has allocated
at most, beyond what it had before. Weights and tokens are random: no perplexity of them would mean anything.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from make_random_checkpoint import Shape, write_checkpoint
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from statprune import Recipe, accelerate, checkpoint, prune, streaming
from statprune.disk.skeleton import open_skeleton
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.progress import unsaid
from statprune.versions import versions

METHODS = ["wanda", "cvr", "cvr+energy", "sparsegpt", "cvr+least-squares", "default"]
PATTERNS = ["50%", "2:4", "4:8"]
TOKENS_PER_CHANNEL = 2


class Check:
    """The measurements on one device, and when to stop.

    Args:
        shape: of the model.
        device: to measure on.
        seconds: after which nothing new is begun.
        batches: of `length` tokens, for the walk.
        length: tokens of a batch.
    """

    def __init__(self, shape: Shape, device: torch.device, seconds: float, batches: int, length: int) -> None:
        self.shape, self.device, self.batches, self.length = shape, device, batches, length
        self.deadline = time.perf_counter() + seconds
        self.left_out: list[str] = []

    def has_time(self, what: str) -> bool:
        """Whether to begin with something."""
        has_time = time.perf_counter() < self.deadline
        if not has_time:
            self.left_out.append(what)
        return has_time

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, run: Callable[[], Any], runs: int = 3) -> dict[str, float]:
        """Seconds, the least of some runs, and bytes."""
        seconds, peak, before = [], 0, 0
        for _ in range(runs + 1):
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
                before = torch.cuda.memory_allocated(self.device)
            self.synchronize()
            began = time.perf_counter()
            run()
            self.synchronize()
            seconds.append(time.perf_counter() - began)
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device) - before
        return {"seconds": min(seconds[1:] or seconds), "bytes": peak}

    def block(self) -> list[tuple[int, int]]:
        """[out, in] of the weights of one block; those behind each other that read the same inputs share statistics."""
        hidden, inner = self.shape.hidden, self.shape.intermediate
        keys = hidden * self.shape.kv_heads // self.shape.heads
        attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
        return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]

    def random(self, *size: int) -> Tensor:
        """bfloat16."""
        return torch.randn(*size, device=self.device, dtype=torch.bfloat16)

    def copying(self) -> dict[str, Any]:
        """The floors: a block's weights, copied on the device, and from host memory to it."""
        weights = [self.random(*size) for size in self.block()]
        copies = [torch.empty_like(weight) for weight in weights]
        on_host = [weight.cpu().pin_memory() if self.device.type == "cuda" else weight.clone() for weight in weights]

        def copy_from(sources: list[Tensor]) -> None:
            for copy, source in zip(copies, sources, strict=True):
                copy.copy_(source, non_blocking=True)

        places = {"on the device": weights, "from the host": on_host}
        return {where: self.by_weight(self.measure(partial(copy_from, some), runs=10)) for where, some in places.items()}

    def by_weight(self, found: dict[str, float]) -> dict[str, float]:
        """With the nanoseconds that one weight takes."""
        return {**found, "ns_per_weight": found["seconds"] * 1e9 / sum(out * width for out, width in self.block())}

    def pruning(self, method: str, pattern: str) -> dict[str, Any]:
        """A block's weights with their statistics, which are there already."""
        pruner = Recipe(method, pattern=pattern).pruner()
        weights = [self.random(*size) * 0.02 for size in self.block()]
        inputs = {width: self.random(TOKENS_PER_CHANNEL * width, width) for _, width in self.block()}
        groups = [(0, 1, 2), (3,), (4, 5), (6,)]

        def statistics() -> list[InputMoments]:
            needs = pruner.needs & ~Statistic.CURVATURE
            return [
                InputMoments.zeros(width, needs, device=self.device).add(inputs[width])
                for width in (self.block()[group[0]][1] for group in groups)
            ]

        moments = statistics()

        def run() -> None:
            for group, own in zip(groups, moments, strict=True):
                fresh = InputMoments(own.num_tokens, own.sum, own.sum_sq, own.gram)  # without what an earlier run has derived
                for index in group:
                    pruner(weights[index], fresh)

        is_slow = bool(Statistic.GRAM & pruner.needs)
        return {"method": method, "pattern": pattern, **self.by_weight(self.measure(run, runs=1 if is_slow else 5))}

    def sparsegpt_of(self, path: str, pattern: str) -> dict[str, Any]:
        """SparseGPT's own code on the same block, from a checkout of its repository."""
        sys.path.insert(0, path)
        spec = importlib.util.spec_from_file_location("their_sparsegpt", Path(path) / "sparsegpt.py")
        assert spec is not None
        assert spec.loader is not None
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        keep, of = (0, 0) if pattern == "50%" else map(int, pattern.split(":"))
        layers = []
        for out, width in self.block():
            layer = nn.Linear(width, out, bias=False, device=self.device, dtype=torch.bfloat16)
            state = theirs.SparseGPT(layer)
            state.add_batch(self.random(1, TOKENS_PER_CHANNEL * width, width), None)
            layers.append(state)

        def run() -> None:
            for state in layers:
                state.fasterprune(0.5, prunen=keep, prunem=of)

        # Once, since it changes its layers and lets go of their statistics.
        return {"method": "SparseGPT's own code", "pattern": pattern, **self.by_weight(self.measure(run, runs=0))}

    def config(self) -> LlamaConfig:
        """Of the model that is walked."""
        return LlamaConfig(
            hidden_size=self.shape.hidden, intermediate_size=self.shape.intermediate, num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads, num_key_value_heads=self.shape.kv_heads, vocab_size=self.shape.vocabulary,
            max_position_embeddings=self.shape.context,
        )  # fmt: skip

    def tokens(self) -> list[Tensor]:
        """The batches."""
        generator = torch.Generator().manual_seed(0)
        sizes = (self.batches, self.length)
        return list(torch.randint(3, self.shape.vocabulary, sizes, generator=generator).to(self.device).split(1))

    def walking(self) -> dict[str, Any]:
        """A plain forward pass of the decoder over all batches, and `prune` of the same model on them."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = LlamaForCausalLM(self.config()).to(torch.bfloat16).eval()
        batches = self.tokens()

        @torch.no_grad()
        def forward() -> None:
            for batch in batches:
                model.model(batch, use_cache=False)

        found: dict[str, Any] = {"forward": self.measure(forward, runs=2)}
        for method in ("wanda", "cvr+energy", "sparsegpt", "default"):
            if self.has_time(f"walk {method}"):
                took: dict[str, float] = {}

                def run(method: str = method, took: dict[str, float] = took) -> None:
                    took.update(prune(model, batches, method, pattern="2:4").seconds)

                found[method] = {**self.measure(run, runs=1), "parts": took}
        return found

    def accelerated(self) -> dict[str, Any]:
        """A 2:4 model of the same shape on packed weights: layers and forward passes, as they are and compiled."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = LlamaForCausalLM(self.config()).to(torch.bfloat16).eval()
        prune(model, self.tokens()[:1], "magnitude", pattern="2:4")
        found: dict[str, Any] = {}
        # Each number of tokens is compiled anew.
        for name, tokens, compiled in (("eager", [1, 64, 2048], False), ("compiled", [2048], True)):
            if self.has_time(f"accelerated {name}"):
                with accelerate(model, tokens, compiled=compiled) as done:
                    found[name] = done.report.to_dict()
        return found

    def streamed(self, folder: Path) -> dict[str, Any]:
        """The same from files: the weights go to the device segment by segment."""
        model, out = folder / "model", folder / "out"
        write_checkpoint(model, self.shape)
        found: dict[str, Any] = {}
        for method in ("wanda", "cvr+energy"):
            if self.has_time(f"streamed {method}"):
                skeleton = open_skeleton(str(model), device=str(self.device))
                inputs = bind_batches(skeleton.model, self.tokens())
                layers = find_layers(skeleton.model, inputs)
                with checkpoint.reserve(out / method, resumes=True, say=unsaid) as place:
                    report, stored_in = streaming.prune_streamed(
                        skeleton, layers, inputs, Recipe(method, pattern="2:4"), place, max_shard_size="5GB"
                    )
                    checkpoint.finish(skeleton.model, report, place, stored_in, source=model)
                found[method] = {"parts": report.seconds, "memory": report.memory}
        return found


def outcome(path: Path | None) -> dict[str, Any] | None:
    """Of the tests: how many passed, failed and were skipped, and the names of those that failed."""
    if path is None or not path.is_file():
        return None
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped), "skipped": len(skipped),
        "failed": [f"{case.get('name')}: {(case[0].get('message') or '')[:300]}" for case in failed],
    }  # fmt: skip


def hardware(device: torch.device) -> dict[str, Any]:
    """What this is measured on."""
    if device.type != "cuda":
        return {"device": "cpu", "threads": torch.get_num_threads(), "versions": versions()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda, "versions": versions(),
    }  # fmt: skip


def main() -> None:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--tests", type=Path, help="what pytest wrote with --junitxml")
    parser.add_argument("--sparsegpt", help="a checkout of SparseGPT's repository, to run its code beside ours")
    parser.add_argument("--seconds", type=float, default=200, help="after which nothing new is begun (200)")
    parser.add_argument("--small", action="store_true", help="a small model and few tokens, for a CPU")
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        parser.error("there is no GPU. --small measures a small model on the CPU.")
    device = torch.device("cpu" if given.small else "cuda")
    shape = Shape(256, 688, 2, 4, 4, 1000, 512) if given.small else Shape(layers=4)
    check = Check(shape, device, given.seconds, *((4, 64) if given.small else (32, 2048)))
    found: dict[str, Any] = {"hardware": hardware(device), "tests": outcome(given.tests), "left_out": check.left_out}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        given.output.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(value[-1] if name == 'block' else value, default=str)}", flush=True)

    keep("copy", check.copying())
    block: list[dict[str, Any]] = []
    for method in METHODS:
        for pattern in PATTERNS:
            if check.has_time(f"block {method} {pattern}"):
                block.append(check.pruning(method, pattern))
                keep("block", block)
    if given.sparsegpt and check.has_time("SparseGPT's own code"):
        keep("peer", [check.sparsegpt_of(given.sparsegpt, pattern) for pattern in PATTERNS])
    if check.has_time("walk"):
        keep("walk", check.walking())
    if check.has_time("accelerated"):
        keep("accelerated", check.accelerated())
    if check.has_time("streamed"):
        with tempfile.TemporaryDirectory(prefix="statprune-gpu-check-") as folder:
            keep("streamed", check.streamed(Path(folder)))
    keep("left_out", check.left_out)


if __name__ == "__main__":
    main()
