"""Packing 2:4 weights is exact; and what a measurement makes of them is decided by rules that stand here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from packed_on_cpu import FORGETFUL, HALVED, KERNEL, OnCPU
from statprune.acceleration.accelerate import choose
from statprune.acceleration.candidates import find_candidates
from statprune.acceleration.float8 import Float8
from statprune.acceleration.measuring import DeviceStopwatch, Timings, copies, relative_error
from statprune.acceleration.packing import KERNELS, SemiStructured, pack_undoably
from tiny_models import gpt2, llama

quick = settings(max_examples=40, deadline=None, derandomize=True)
DTYPES = [torch.float16, torch.bfloat16, torch.int8]


def two_of_four(rows, columns, dtype, seed=0):
    """Random, with the lower two of every four at zero and so are some of the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    groups = weight.view(rows, -1, 4)
    groups.scatter_(-1, groups.abs().topk(2, largest=False).indices, 0.0)
    weight[torch.rand(weight.shape, generator=generator) < 0.2] = 0.0
    return (40 * weight).to(dtype) if dtype is torch.int8 else weight.to(dtype)


def bits(tensor):
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16)


class TestPacking:
    @quick
    @given(st.sampled_from(DTYPES), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1), st.booleans())
    def test_gives_the_same_bits_back(self, dtype, rows, columns, seed, has_minus_zeros):
        weight = two_of_four(32 * rows, 128 * columns, dtype, seed)
        if has_minus_zeros and dtype is not torch.int8:
            weight[::3] *= -0.0
            weight[1::3].copy_(torch.where(weight[1::3] == 0, -0.0, weight[1::3]))
        packed, unpack = pack_undoably(KERNEL, weight)
        assert torch.equal(bits(unpack(packed)), bits(weight))
        places, kept = packed.meta, packed.packed
        assert kept.shape == (weight.shape[0], weight.shape[1] // 2)
        assert places.numel() * places.element_size() * 8 == 2 * kept.numel()

    def test_one_row_by_hand(self):
        """Two bits for each place, the first of a group lowest: 0 and 3, 1 and 3, 2 and 3, 0 and 1."""
        weight = torch.zeros(32, 64, dtype=torch.float16)
        weight[0, :16] = torch.tensor([1, 0, 0, 5, 0, 2, 0, 3, 0, 0, 4, 6, 7, 8, 0, 0])
        packed = KERNEL.pack(weight)
        assert packed.packed[0, :8].tolist() == [1, 5, 2, 3, 4, 6, 7, 8]
        places = int("0100111011011100", 2)  # of the fourth group, the third, the second, the first
        assert places in packed.meta.view(torch.uint16).int().view(-1).tolist()

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_groups_may_keep_fewer_than_two_wherever_they_stand(self, count):
        places = torch.combinations(torch.arange(4), count) if count else torch.zeros(1, 0, dtype=torch.int64)
        weight = torch.zeros(32, 64, dtype=torch.bfloat16)
        for row, place in enumerate(places):
            weight.view(32, 16, 4)[row, :, place] = 1.5
        packed, unpack = pack_undoably(KERNEL, weight)
        assert torch.equal(unpack(packed), weight)

    def test_what_does_not_come_back_is_none(self):
        weight = two_of_four(32, 64, torch.bfloat16)
        assert pack_undoably(FORGETFUL, weight) is None
        weight[3, :3] = 1.0
        assert pack_undoably(KERNEL, weight) is None

    def test_says_nothing_of_prototypes(self, recwarn):
        KERNEL.pack(two_of_four(32, 64, torch.bfloat16))
        assert not recwarn.list

    @quick
    @given(st.sampled_from(DTYPES[:2]), st.integers(1, 3), st.integers(1, 9), st.booleans())
    def test_a_product_is_the_dense_one(self, dtype, batch, length, has_bias):
        torch.manual_seed(0)
        layer = nn.Linear(64, 32, bias=has_bias, dtype=dtype)
        layer.weight.data = two_of_four(32, 64, dtype)
        inputs = torch.randn(batch, length, 64, dtype=dtype)
        expected = layer(inputs)
        layer.weight = nn.Parameter(KERNEL.pack(layer.weight), requires_grad=False)
        torch.testing.assert_close(layer(inputs), expected, rtol=2**-7, atol=2**-7)

    def test_names_and_algorithms(self):
        assert [kernel.name for kernel in KERNELS] == ["cusparselt", "cutlass"]
        tuned = SemiStructured(OnCPU, 7, "cpu")
        assert tuned.name == "cpu:7"
        assert tuned.pack(two_of_four(32, 64, torch.float16)).detach().alg_id_cusparselt == 7
        assert KERNEL.tuned(two_of_four(32, 64, torch.float16), [1]) == [KERNEL]

    def test_what_cusparselt_finds_by_itself_is_tried_too(self, monkeypatch):
        """By torch's own search, for eights of tokens; once where it finds the same twice."""
        asked = []

        def search(packed, inputs, transpose_result):
            asked.append((packed.shape, tuple(inputs.shape), transpose_result))
            return {8: 0, 16: 3, 2048: 3}[inputs.shape[1]]

        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
        monkeypatch.setattr("statprune.acceleration.packing.SparseSemiStructuredTensorCUSPARSELT", OnCPU)
        tuned = KERNEL.tuned(two_of_four(32, 64, torch.float16), [1, 9, 2048])
        assert [kernel.name for kernel in tuned] == ["cpu", "cpu:3"]
        assert asked == [((32, 32), (64, count), True) for count in (8, 16, 2048)]

    @pytest.mark.parametrize(
        ("kind", "shape", "dtype", "why"),
        [
            (SparseSemiStructuredTensorCUSPARSELT, (16, 16), torch.float16, None),
            (SparseSemiStructuredTensorCUSPARSELT, (16, 24), torch.float16, "cusparselt takes multiples of 16 x 16"),
            (SparseSemiStructuredTensorCUTLASS, (32, 64), torch.bfloat16, None),
            (SparseSemiStructuredTensorCUTLASS, (48, 64), torch.bfloat16, "cutlass takes multiples of 32 x 64"),
            (SparseSemiStructuredTensorCUTLASS, (32, 64), torch.float32, "float32: the kernels multiply float16 and bfloat16"),
            (SparseSemiStructuredTensorCUTLASS, (32, 128), torch.int8, "int8: the kernels multiply float16 and bfloat16"),
        ],
    )
    def test_which_weights_torch_takes(self, kind, shape, dtype, why):
        assert SemiStructured(kind, device="cpu").why_not(torch.zeros(shape, dtype=dtype)) == why
        if why is None:
            assert SemiStructured(kind).why_not(torch.zeros(shape, dtype=dtype)) == "no GPU: it is on the cpu"


class Odd(nn.Linear):
    pass


def found(model, kernels=(KERNEL,)):
    candidates, left_out = find_candidates(model, kernels)
    return [one.name for one in candidates], {one.name: one.reason for one in left_out}


def linear(rows, columns, dtype=torch.bfloat16, kind=nn.Linear):
    layer = kind(columns, rows, dtype=dtype)
    layer.weight.data = two_of_four(rows, columns, dtype)
    return layer


class TestCandidates:
    def test_each_reason(self):
        model = nn.ModuleDict(
            {
                "good": linear(32, 64),
                "dense": nn.Linear(64, 32, dtype=torch.bfloat16),
                "narrow": linear(32, 24),
                "wide": linear(32, 64, torch.float32),
                "odd": linear(32, 64, kind=Odd),
                "table": nn.Embedding(32, 64, dtype=torch.bfloat16),
                "meta": nn.Linear(64, 32, dtype=torch.bfloat16, device="meta"),
                "packed": linear(32, 64),
                "tied": linear(32, 64),
                "other": linear(32, 64),
            }
        )
        model["packed"].weight = nn.Parameter(KERNEL.pack(model["packed"].weight), requires_grad=False)
        model["other"].weight = model["tied"].weight
        names, reasons = found(model)
        assert names == ["good"]
        assert reasons == {
            "dense": "not 2:4",
            "narrow": "cpu takes multiples of 32 x 64",
            "wide": "float32: the kernels multiply float16 and bfloat16",
            "odd": "in Odd, not in nn.Linear",
            "table": "in Embedding, not in nn.Linear",
            "meta": "on meta, without values",
            "packed": "a OnCPU already",
            "tied": "tied to other.weight",
        }

    def test_without_a_gpu_it_is_said_of_each(self):
        names, reasons = found(nn.Sequential(linear(32, 64), linear(16, 32), linear(8, 16)), KERNELS)
        assert not names
        assert reasons == {
            "0": "no GPU: it is on the cpu",
            "1": "no GPU: it is on the cpu; cutlass takes multiples of 32 x 64",
            "2": "cusparselt takes multiples of 16 x 16; cutlass takes multiples of 32 x 64",
        }

    def test_a_module_that_stands_in_two_places_has_one_weight(self):
        layer = linear(32, 64)
        assert found(nn.Sequential(layer, nn.ReLU(), layer)) == (["0"], {})

    def test_every_weight_of_a_model_is_told_of(self):
        for model in (llama(), llama(tie_word_embeddings=True), gpt2()):
            names, reasons = found(model)
            assert {*names, *reasons} == {
                name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.ndim >= 2
            }

    def test_no_kernel(self):
        assert found(linear(32, 64), ()) == ([], {"weight": "no kernel"})


def timings(**packed):
    kernels = {name: SemiStructured(type(name, (), {"BACKEND": name})) for name in packed}
    return Timings({1: 10.0, 64: 20.0}, {kernels[name]: {1: a, 64: b} for name, (a, b) in packed.items()})


class TestTheChoice:
    @pytest.mark.parametrize(
        ("packed", "chosen", "why"),
        [
            ({"a": (5.0, 10.0)}, "a", ""),
            ({"a": (9.6, 10.0)}, None, "not faster: 1.04 times dense at 1 tokens, by a"),
            ({"a": (5.0, 25.0)}, None, "not faster: 0.80 times dense at 64 tokens, by a"),
            ({"a": (5.0, 25.0), "b": (9.0, 18.0)}, "b", ""),  # a is much faster, but not always
            ({"a": (8.0, 16.0), "b": (9.0, 10.0)}, "b", ""),  # 1.25, 1.25 and 1.11, 2.0
            ({"a": (20.0, 40.0), "b": (10.0, 30.0)}, None, "not faster: 0.67 times dense at 64 tokens, by b"),
            ({}, None, "no kernel runs here"),
        ],
    )
    def test_is_by_every_number_of_tokens(self, packed, chosen, why):
        kernel, reason = choose(timings(**packed), 1.05)
        assert (kernel and kernel.name, reason) == (chosen, why)

    def test_how_much_faster_is_a_matter_of_taste(self):
        assert choose(timings(a=(9.6, 10.0)), 1.04)[0] is not None
        assert choose(timings(a=(5.0, 10.0)), 2.1)[0] is None


class TestTheStopwatch:
    def layer(self, kernels, **options):
        weight = two_of_four(32, 64, torch.bfloat16)
        return DeviceStopwatch(torch.device("cpu"), **options).layer(weight, torch.zeros(32).bfloat16(), kernels, [1, 5])

    def test_measures_each_kernel_at_each_number_of_tokens(self):
        found = self.layer([KERNEL])
        assert found.dense.keys() == found.packed[KERNEL].keys() == {1, 5}
        assert all(took > 0 for took in (*found.dense.values(), *found.packed[KERNEL].values()))
        assert found.ratios(KERNEL)[5] == found.dense[5] / found.packed[KERNEL][5]
        assert not found.failed

    @pytest.mark.filterwarnings("ignore")  # torch's own, of what it compiles with
    def test_compiled_it_measures_what_is_compiled(self, monkeypatch):
        compiled, compile_ = [], torch.compile
        monkeypatch.setattr(
            torch,
            "compile",
            lambda function, **options: compiled.append(options) or compile_(function, backend="eager", **options),
        )
        found = self.layer([KERNEL, HALVED], compiled=True)
        assert compiled == [{"dynamic": False}]
        assert found.packed[KERNEL].keys() == {1, 5}
        assert found.failed.keys() == {"halved"}

    def test_a_kernel_that_computes_something_else_is_out(self):
        found = self.layer([HALVED, KERNEL])
        assert list(found.packed) == [KERNEL]
        assert found.failed == {"halved": "off by 50 % at 1 tokens, more than 2 %"}

    def test_one_that_does_not_run_is_out(self):
        class Broken(OnCPU):
            BACKEND = "broken"

            def _mm(self, B, **kwargs):
                raise RuntimeError("only for other chips\nand a trace")

        class Unpackable(OnCPU):
            BACKEND = "unpackable"

            @classmethod
            def from_dense(cls, _):
                raise NotImplementedError("no library")

        found = self.layer([SemiStructured(Broken, device="cpu"), SemiStructured(Unpackable, device="cpu"), KERNEL])
        assert list(found.packed) == [KERNEL]
        assert found.failed == {"broken": "only for other chips", "unpackable": "no library"}

    def test_out_of_memory_is_no_answer(self):
        class Hungry(OnCPU):
            @classmethod
            def from_dense(cls, _):
                raise torch.OutOfMemoryError("all gone")

        with pytest.raises(torch.OutOfMemoryError):
            self.layer([SemiStructured(Hungry, device="cpu")])

    def test_calls_follow_each_other_with_other_copies_of_the_weight(self):
        assert copies(2**20, 2**20) == 2
        assert copies(2**20, 50 * 2**20) == 16  # a layer this small is slow for other reasons
        assert copies(16 * 2**20, 50 * 2**20) == 7
        assert copies(2**30, 50 * 2**20) == 2

    def test_a_pass(self):
        ran = []
        assert DeviceStopwatch(torch.device("cpu")).forward(lambda: ran.append(1)) >= 0
        assert len(ran) == 7


def test_a_reference_is_no_choice_and_has_to_be_beaten():
    one, reference = SemiStructured(OnCPU), Float8("plain")
    found = Timings({1: 10.0}, {one: {1: 5.0}, reference: {1: 6.0}})
    assert found.ratios(one) == {1: 1.2}
    assert choose(found, 1.2) == (one, "")
    assert choose(found, 1.3)[0] is None
    assert choose(Timings({1: 10.0}, {reference: {1: 6.0}}), 1.0) == (None, "no kernel runs here")


def test_the_relative_error_by_hand():
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert relative_error(expected, expected) == 0
    assert relative_error(torch.tensor([[3.0, 3.0], [0.0, 0.0]]), expected) == pytest.approx(0.2)
    assert relative_error(torch.full((2, 2), torch.nan), expected) == float("inf")
    assert relative_error(torch.ones(1, 2), torch.zeros(1, 2)) == float("inf")
    long = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    assert relative_error(long * 1.5, long) == pytest.approx(0.5)
