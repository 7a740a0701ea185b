"""`accelerate`, with kernels that run on a CPU and times that are made up: what it changes, checks, undoes and says."""

import copy
import enum
import json
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import nn

import statprune
from packed_on_cpu import FORGETFUL, HALVED, KERNEL, FakeStopwatch, OnCPU
from statprune.acceleration.float8 import Float8, float8_kernels
from statprune.acceleration.measuring import DeviceStopwatch
from statprune.acceleration.packing import SemiStructured
from statprune.commands.cli import main
from statprune.errors import AccelerationError, CalibrationError, NonFiniteError
from tiny_models import changed, llama, refused, snapshot, tokens

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
LAYERS = 7


@pytest.fixture(scope="module")
def sparse():
    """A LLaMA of one layer, 2:4 in bfloat16; its output layer is dense."""
    model = llama(**WIDE).bfloat16()
    statprune.prune(model, tokens(4, 16).split(2), "magnitude", pattern="2:4")
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sparse):
    folder = tmp_path_factory.mktemp("sparse")
    sparse.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(sparse):
    return copy.deepcopy(sparse)


def accelerate(model, ratios=2.0, forwards=(2, 2, 1, 1), kernels=(KERNEL,), counts=(1, 16), **options):
    stopwatch = FakeStopwatch(ratios, forwards)
    return statprune.accelerate(model, list(counts), kernels=kernels, stopwatch=stopwatch, **options)


def packed(model):
    return {name.removesuffix(".weight") for name, one in model.named_parameters() if isinstance(one, OnCPU)}


class TestWhereItIsFaster:
    def test_2_4_layers_run_packed_and_predict_the_same(self, model):
        inputs = tokens(2, 9)
        with torch.no_grad():
            expected = model(inputs).logits
        text = model.generate(inputs, max_new_tokens=6, do_sample=False)
        report = accelerate(model).report
        assert packed(model) == {one.name for one in report.accelerated}
        assert len(packed(model)) == LAYERS
        with torch.no_grad():
            torch.testing.assert_close(model(inputs).logits, expected)
        assert torch.equal(model.generate(inputs, max_new_tokens=6, do_sample=False), text)

    @pytest.mark.filterwarnings("ignore")  # torch's own, of what it compiles with
    def test_torch_compile_takes_the_result(self, model):
        inputs = tokens(2, 9)
        with torch.no_grad():
            expected = model(inputs).logits
            accelerate(model)
            found = torch.compile(model, backend="aot_eager", fullgraph=True)(inputs).logits
        torch.testing.assert_close(found, expected)

    @pytest.mark.filterwarnings("ignore")
    def test_it_can_be_the_compiled_model_that_is_compared(self, model, monkeypatch):
        compiled, compile_ = [], torch.compile
        monkeypatch.setattr(torch, "compile", lambda one: compiled.append(one) or compile_(one, backend="eager"))
        report = accelerate(model, compiled=True).report
        assert compiled
        assert all(one is model for one in compiled)
        assert len(report.accelerated) == LAYERS
        assert report.call == "statprune.accelerate(model, tokens=[1, 16], compiled=True)"

    def test_undone_it_is_to_the_bit_what_it_was_with_the_same_parameters(self, model):
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data[0] *= -1e-38  # some of them become a zero with a minus
        weight.data[1] *= -1.0
        before, parameters, order = snapshot(model), dict(model.named_parameters()), list(model.state_dict())
        bits = {name: one.view(torch.int16) for name, one in before.items() if one.dtype is torch.bfloat16}
        done = accelerate(model)
        assert weight.numel() == 0  # its values are in the packed one alone
        assert list(model.state_dict()) == order
        done.undo()
        done.undo()
        assert changed(model, before) == set()
        assert all(torch.equal(one.view(torch.int16), bits[name]) for name, one in snapshot(model).items() if name in bits)
        assert all(one is parameters[name] for name, one in model.named_parameters())
        assert all(one.requires_grad for one in model.parameters())

    def test_in_a_with_statement_it_is_undone_at_the_end(self, model):
        before = snapshot(model)
        with accelerate(model):
            assert len(packed(model)) == LAYERS
        assert changed(model, before) == set()

    def test_twice_there_is_nothing_left_to_do(self, model):
        first = accelerate(model)
        second = accelerate(model)
        assert not second.report.accelerated
        assert sum(one.reason == "a OnCPU already" for one in second.report.stays_dense) == LAYERS
        first.undo()
        assert not packed(model)

    def test_of_each_kind_one_layer_is_measured(self, model):
        stopwatch = FakeStopwatch(2.0, (2, 1))
        statprune.accelerate(model, [8, 8], kernels=[KERNEL], stopwatch=stopwatch)
        shapes = [(64, 64), (32, 64), (128, 64), (64, 128)]
        assert stopwatch.layers == [(shape, ("cpu",), (8,)) for shape in shapes]

    def test_the_report(self, model):
        done = accelerate(model, {(128, 64): 0.9, 1: 2.0, 16: 1.5})
        data = json.loads(json.dumps(done.report.to_dict()))
        by_shape = {tuple(one["shape"]): one for one in data["measured"] if one["tokens"] == 16}
        assert by_shape[64, 64] == {
            "shape": [64, 64], "dtype": "bfloat16", "bias": False, "layers": 2, "kernel": "cpu", "tokens": 16,
            "dense": 1600.0, "sparse": pytest.approx(1600 / 1.5), "is_chosen": True, "ratio": pytest.approx(1.5),
        }  # fmt: skip
        assert not by_shape[128, 64]["is_chosen"]
        slow = "not faster: 0.90 times dense at 1 tokens, by cpu"
        assert {one["name"]: one["reason"] for one in data["stays_dense"]} == {
            "model.embed_tokens": "in Embedding, not in nn.Linear", "lm_head": "not 2:4",
            "model.layers.0.mlp.up_proj": slow, "model.layers.0.mlp.gate_proj": slow,
        }  # fmt: skip
        assert data["whole"] == [
            {"tokens": count, "dense": 2, "sparse": 1, "error": pytest.approx(0, abs=0.01), "ratio": 2.0} for count in (1, 16)
        ]
        assert (data["tokens"], data["device"], data["tolerance"]) == ([1, 16], "cpu", 0.05)
        shown = str(done)
        assert shown.startswith("5 weights of 9 are packed now; the predictions are off by")
        assert "| 2 of 64 x 64 | cpu | 16 | 1600.0 | 1066.7 | 1.50 | * |" in shown
        assert "| 16 | 8 | 16 | 2.00 |" in shown
        assert "stays dense: 1 weight, not 2:4" in shown


class TestWhereItIsNot:
    def test_nothing_is_changed(self, model):
        before, parameters = snapshot(model), dict(model.named_parameters())
        done = accelerate(model, 1.04, ())
        assert str(done).startswith("Nothing is faster on packed weights here, and nothing was changed.")
        assert all(one is parameters[name] for name, one in model.named_parameters())
        assert changed(model, before) == set()
        assert len(done.report.measured) == 2 * 4
        assert not any(one.is_chosen for one in done.report.measured)

    def test_on_a_cpu_it_says_so_of_each_layer(self, model):
        before = snapshot(model)
        report = statprune.accelerate(model, [1, 64, 2048]).report
        assert changed(model, before) == set()
        assert report.reasons()[0] == ("no GPU: it is on the cpu", LAYERS)
        assert not report.measured

    def test_a_model_that_is_slower_for_all_that_is_undone(self, model):
        before = snapshot(model)
        report = accelerate(model, forwards=(2, 2, 1, 2)).report
        assert changed(model, before) == set()
        assert not report.accelerated
        assert report.reasons()[0] == ("the whole model is not faster: 1.00 times dense at 16 tokens", LAYERS)
        assert [one.ratio for one in report.whole] == [2.0, 1.0]

    def test_a_weight_that_does_not_come_back_stays_as_it_is(self, model):
        model.model.layers[0].self_attn.q_proj.weight.data[0] = 0.0
        before = snapshot(model)
        done = accelerate(model, kernels=(FORGETFUL,))
        assert packed(model) == {"model.layers.0.self_attn.q_proj"}
        assert ("forgetful does not give its bits back", LAYERS - 1) in done.report.reasons()
        done.undo()
        assert changed(model, before) == set()

    def test_nor_does_a_model_without_any_that_does(self, model):
        report = accelerate(model, kernels=(FORGETFUL,)).report
        assert not packed(model)
        assert (report.accelerated, report.whole) == ((), ())


class TestWhatIsRefusedIsUndone:
    def test_other_predictions(self, model):
        with refused(model, AccelerationError, "off by .* % of their norm, more than the 5 %"):
            accelerate(model, kernels=(HALVED,))

    def test_unless_they_are_allowed(self, model):
        report = accelerate(model, kernels=(HALVED,), tolerance=2.0).report
        assert 0.05 < report.whole[0].error < 2.0
        assert report.tolerance == 2.0

    def test_a_model_that_does_not_run_packed(self, model):
        class Broken(OnCPU):
            def _mm(self, B, **kwargs):
                raise RuntimeError("not on this chip")

        with refused(model, AccelerationError, "does not run on packed weights: not on this chip"):
            accelerate(model, kernels=(SemiStructured(Broken, device="cpu"),))

    def test_an_interruption(self, model):
        class Interrupted(FakeStopwatch):
            def forward(self, run):
                if not self.forwards:
                    raise KeyboardInterrupt
                return super().forward(run)

        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            statprune.accelerate(model, [4], kernels=[KERNEL], stopwatch=Interrupted(2.0, [1]))
        assert changed(model, before) == set()

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"counts": ()}, r"tokens=\[\]: expected the numbers of tokens"),
            ({"counts": (0,)}, r"tokens=\[0\]"),
            ({"counts": (1.5,)}, r"tokens=\[1.5\]"),
            ({"counts": (True,)}, r"tokens=\[True\]"),
            ({"speedup": 0.9}, r"speedup=0.9: expected 1 or more"),
            ({"speedup": float("nan")}, "speedup=nan"),
            ({"tolerance": 0.0}, "tolerance=0.0: expected a number above 0"),
        ],
    )
    def test_numbers_that_cannot_be(self, model, options, expected):
        with refused(model, AccelerationError, expected):
            accelerate(model, **options)

    def test_a_model_that_predicts_no_numbers_while_dense(self, model):
        model.lm_head.weight.data[0] = torch.inf
        with refused(model, NonFiniteError, "predicts NaN or infinity"):
            accelerate(model)


class Rounded(Float8):
    """Rounded by torch itself, in the place of torchao, and no longer packed: what a kernel that is not exact goes through."""

    def pack(self, weight):
        return weight.detach().to(torch.float8_e4m3fn).to(weight.dtype)


class TestFloat8:
    def kernels(self, monkeypatch):
        found = (Rounded(device="cpu"), Rounded("plain", device="cpu"))
        monkeypatch.setattr("statprune.acceleration.accelerate.float8_kernels", lambda: found)

    def pruned(self):
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1}
        model = llama(**{**WIDE, **sizes}).bfloat16()
        statprune.prune(model, tokens(4, 16).split(2), "magnitude", pattern="2:4")
        return model

    def test_is_rounded_within_a_tolerance_of_its_own_and_undone_to_the_bit(self, monkeypatch):
        self.kernels(monkeypatch)
        model = self.pruned()
        before = snapshot(model)
        done = accelerate(model, {"float8": 2.0, "float8-dense": 1.5}, quantize="float8")
        assert {one.kernel for one in done.report.accelerated} == {"float8"}
        assert len(done.report.accelerated) == LAYERS
        assert changed(model, before)
        assert 0.001 < done.report.whole[1].error < done.report.tolerance == 0.25
        assert done.report.call == "statprune.accelerate(model, tokens=[1, 16], quantize='float8')"
        done.undo()
        assert changed(model, before) == set()

    def test_has_to_be_faster_than_float8_without_2_4(self, monkeypatch):
        self.kernels(monkeypatch)
        model = self.pruned()
        report = accelerate(model, {"float8": 2.0, "float8-dense": 1.95}, (), quantize="float8").report
        assert ("not faster: 1.03 times dense at 1 tokens, by float8", LAYERS) in report.reasons()
        assert not any(one.is_chosen for one in report.measured)

    def test_which_weights_it_takes(self):
        kernel = Float8(device="cpu")
        assert kernel.why_not(torch.zeros(32, 128).bfloat16()) is None
        assert Float8().why_not(torch.zeros(32, 128).bfloat16()) == "no GPU: it is on the cpu"
        assert kernel.why_not(torch.zeros(32, 64).bfloat16()) == "float8 takes multiples of 32 x 128"
        assert kernel.why_not(torch.zeros(32, 128).half()) == "float16: float8 is made of bfloat16"

    @pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
    def test_without_torchao_it_is_refused(self, model):
        with refused(model, AccelerationError, "torchao is not installed. 2:4 in float8 takes `pip install 'torchao>=0.18'`"):
            accelerate(model, quantize="float8")

    def test_there_is_no_int8(self, model):
        with refused(model, AccelerationError, "quantize='int8': expected 'float8' or None. There is no int8"):
            accelerate(model, quantize="int8")

    @pytest.fixture
    def torchao(self, monkeypatch):
        """Stands for torchao, as far as it is used; `.says` is called with the layer and the configuration."""

        class Format(enum.Enum):
            PLAIN = "plain"
            SPARSE = "sparse_2d_data_2d_metadata"

        top, inner, api = (ModuleType(f"torchao{name}") for name in ("", ".quantization", ".quantization.quant_api"))
        inner.Float8DynamicActivationFloat8WeightConfig = lambda **settings: settings
        inner.PerRow = lambda: "rows"
        inner.quantize_ = lambda holder, config: inner.says(holder[0], config)
        api.Float8PackingFormat = Format
        for module in (top, inner, api):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        inner.quant_api = api
        return inner

    def test_is_what_torchao_makes_of_a_layer(self, torchao):
        weight, told = torch.zeros(32, 128).bfloat16(), []

        def says(layer, config):
            told.append((tuple(layer.weight.shape), config["granularity"], config["packing_format"].value))
            layer.weight = nn.Parameter(KERNEL.pack(layer.weight), requires_grad=False)

        torchao.says = says
        sparse, plain = float8_kernels()
        assert (sparse.name, sparse.is_reference, plain.name, plain.is_reference) == ("float8", False, "float8-dense", True)
        assert sparse.tuned(weight, [1]) == [sparse]
        assert isinstance(plain.pack(weight), OnCPU)
        assert told == [((32, 128), "rows", "sparse_2d_data_2d_metadata"), ((32, 128), "rows", "plain")]

    def test_what_torchao_asserts_is_a_reason(self, torchao):
        def says(layer, config):
            raise AssertionError("requires CUDA compute capability 8.9")

        torchao.says = says
        found = DeviceStopwatch(torch.device("cpu")).layer(torch.zeros(32, 128).bfloat16(), None, float8_kernels(), [1])
        assert found.failed == dict.fromkeys(("float8", "float8-dense"), "requires CUDA compute capability 8.9")
        torchao.says = lambda layer, config: None
        with pytest.raises(RuntimeError, match="torchao left the weight as it was"):
            Float8().pack(torch.zeros(32, 128).bfloat16())

    def test_an_older_torchao_is_refused(self, torchao, monkeypatch):
        monkeypatch.setattr(torchao.quant_api, "Float8PackingFormat", enum.Enum("Format", {"PLAIN": "plain"}))
        with pytest.raises(AccelerationError, match=r"takes `pip install 'torchao>=0\.18'`"):
            float8_kernels()


class TestInputs:
    def linear(self):
        layer = nn.Linear(64, 32).half()
        layer.weight.data.view(32, 16, 4)[..., 2:] = 0.0
        return nn.Sequential(layer, nn.ReLU())

    def test_any_module_runs_on_inputs_of_its_own(self):
        model = self.linear()
        inputs = torch.randn(5, 64).half()
        expected = model(inputs)
        report = accelerate(model, inputs=[(inputs,)], forwards=(2, 1)).report
        assert [one.name for one in report.accelerated] == ["0"]
        torch.testing.assert_close(model(inputs), expected, rtol=2**-9, atol=1e-3)
        assert report.tolerance == 0.01

    def test_which_cannot_be_made_up(self):
        model = self.linear()
        with refused(model, AccelerationError, r"No inputs can be made up for Sequential.*inputs=\[batch"):
            accelerate(model)

    def test_which_have_to_fit(self):
        model = self.linear()
        with refused(model, CalibrationError, "Sequential does not run on the inputs that it is measured with"):
            accelerate(model, inputs=[(torch.randn(5, 63).half(),)])

    def test_made_up_tokens_fit_into_the_context(self, model):
        """32 tokens of context: 80 tokens are 3 rows of 27, the fewest that are as many."""
        report = accelerate(model, counts=(1, 32, 80), forwards=(2, 2, 2, 1, 1, 1)).report
        assert [one.tokens for one in report.whole] == [1, 32, 81]


class TestTheCommand:
    def run(self, capsys, *words):
        status = main(["accelerate", *words])
        printed = capsys.readouterr()
        return status, printed.out, " ".join(printed.err.split())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_is_refused_before_anything_is_loaded(self, capsys):
        status, out, _ = self.run(capsys, "nowhere", "--tokens", "1", "--json")
        assert status == 1
        assert json.loads(out)["kind"] == "AccelerationError"
        assert "There is no GPU here that torch can use" in json.loads(out)["error"]
        assert "statprune inspect" in json.loads(out)["error"]

    def test_numbers_are_refused_first(self, capsys):
        assert self.run(capsys, "nowhere", "--tokens", "0")[2].startswith("error: tokens=[0]: expected")

    def test_another_device_is_refused(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        status, _, err = self.run(capsys, "nowhere", "--tokens", "1", "--device", "cpu")
        assert (status, "--device cpu: expected a GPU" in err) == (1, True)

    @pytest.fixture
    def on_cpu(self, monkeypatch):
        """As if the CPU were a GPU, with these ratios."""

        def put(ratios, forwards):
            monkeypatch.setattr("statprune.acceleration.accelerate.check_device", lambda device: None)
            monkeypatch.setattr("statprune.acceleration.accelerate.accelerate.__kwdefaults__", {
                **statprune.accelerate.__kwdefaults__, "kernels": (KERNEL,), "stopwatch": FakeStopwatch(ratios, forwards),
            })  # fmt: skip

        return put

    def test_shows_the_tables_what_stays_dense_and_how_to_use_it(self, capsys, folder, on_cpu):
        on_cpu({(128, 64): 0.9, 1: 2.0, 16: 1.5}, (2, 2, 1, 1))
        status, out, err = self.run(capsys, folder, "--tokens", "1", "16", "--device", "cpu", "--speedup", "1.2")
        assert status == 0, err
        for said in (
            "cpu; * chosen: 1.2 times faster at all of them", "2 of 64 x 64", "1066.7", "the whole model", "dense tokens/s",
            "stays dense: 2 weights, not faster: 0.90 times dense at 1 tokens, by cpu",
            "5 weights of 9 are packed now", f'statprune.load({folder!r}, dtype=torch.bfloat16, device="cuda")',
            "statprune.accelerate(model, tokens=[1, 16], speedup=1.2)",
        ):  # fmt: skip
            assert said in out, said
        assert "measuring: 4 of 4" in err

    def test_where_nothing_is_faster_it_says_so_and_succeeds(self, capsys, folder, on_cpu):
        on_cpu(0.8, ())
        status, out, _ = self.run(capsys, folder, "--tokens", "1", "--device", "cpu", "--speedup", "1.2")
        assert (status, "Nothing is faster on packed weights here" in out) == (0, True)
        assert "statprune.load" not in out

    def test_json(self, capsys, folder, on_cpu):
        on_cpu(2.0, (2, 1))
        status, out, _ = self.run(capsys, folder, "--tokens", "16", "--device", "cpu", "--json")
        data = json.loads(out)
        assert (status, data["model"], data["dtype"], len(data["accelerated"])) == (0, folder, "bfloat16", LAYERS)
        assert data["versions"]["torch"]
