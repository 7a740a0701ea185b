"""A transformers Trainer prunes after its training, or trains what is left with the mask held."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import statprune
from statprune import Recipe
from statprune.checkpoint import verify
from statprune.errors import CalibrationError, CheckpointError, MaskError, NonFiniteError, RecipeError, SiteError
from statprune.loading import load_model
from statprune.training.trainer import PruningCallback
from test_callback import TOKENS, layer_weights, loader, sparsity, tiny_llama
from test_finetuning import zeros

pytest.importorskip("accelerate")

RECIPE = Recipe("wanda", "2:4")
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]


def train(tmp_path, *callbacks, seed=0, resume=None, model=None, evaluate=None, **settings):
    usual = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(str(tmp_path / "runs"), **{**usual, **settings})
    model = model or tiny_llama(seed)
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def finetuning(**settings):
    return PruningCallback(RECIPE, then="finetune", **settings)


class Watch(TrainerCallback):
    """Looks at the weights after every step, and at the gradients that clipping saw."""

    def __init__(self):
        self.first, self.steps, self.batches = None, 0, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.first = self.first or zeros(model)
        self.steps += 1
        assert all(torch.equal(now, self.first[name]) for name, now in zeros(model).items())


def test_it_prunes_what_was_trained_and_leaves_the_training_as_it_was(tmp_path):
    dense = train(tmp_path).model
    callback = PruningCallback(RECIPE, output=str(tmp_path / "out"))
    trained = train(tmp_path, callback)
    expected = train(tmp_path).model
    statprune.prune(expected, loader(), RECIPE)
    for name, weight in layer_weights(trained.model).items():
        assert torch.equal(weight == 0, expected.get_parameter(name) == 0), name
        kept = weight != 0
        assert torch.equal(weight[kept], dense.get_parameter(name)[kept]), name
    assert callback.report.sparsity == 0.5
    assert callback.report.num_tokens == TOKENS.numel()
    record = verify(tmp_path / "out")
    assert record["protocol"]["source"] == "transformers Trainer callback"
    reloaded = load_model(str(tmp_path / "out"))
    assert all(torch.equal(weight, trained.model.get_parameter(name)) for name, weight in reloaded.named_parameters())


def test_fine_tuning_holds_the_mask_with_accumulation_and_clipping_and_says_how_sparse_it_is(tmp_path, monkeypatch):
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def watched(parameters, *args, **kwargs):
        parameters = list(parameters)
        norms.append(sum(int(((one == 0) & (one.grad != 0)).sum()) for one in parameters if one.ndim == 2))
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    watch, callback = Watch(), finetuning(output=str(tmp_path / "out"))
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "epoch"}
    trainer = train(tmp_path, callback, watch, max_grad_norm=0.1, **settings)
    assert watch.steps == callback.report.finetuning_steps == 6
    assert norms == [0] * 6, "no gradient of a pruned weight is clipped"
    assert sparsity(trainer.model) == 0.5
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["pruned_sparsity"] for line in evaluated] == [0.5, 0.5]
    assert trainer.evaluate()["pruned_sparsity"] == 0.5
    assert not any("pruned_sparsity" in line for line in trainer.state.log_history if "loss" in line)
    assert evaluated[1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert verify(tmp_path / "out")["finetuning_steps"] == 6
    moments = trainer.optimizer.state[trainer.model.model.layers[0].mlp.up_proj.weight]["exp_avg"]
    assert (moments[trainer.model.model.layers[0].mlp.up_proj.weight == 0] == 0).all()
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks
    assert not any(weight._post_accumulate_grad_hooks for weight in layer_weights(trainer.model).values())


def test_mixed_precision(tmp_path):
    callback = finetuning()
    trainer = train(tmp_path, callback, Watch(), bf16=True, num_train_epochs=1)
    assert sparsity(trainer.model) == 0.5
    assert callback.report.fallback_reason is None


@pytest.mark.parametrize("restore", [False, True])
def test_resuming_goes_on_with_the_mask_and_ends_as_if_it_had_not_stopped(restore, tmp_path):
    whole = train(tmp_path, first := finetuning(), save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "runs" / "checkpoint-3"
    resumed = finetuning(calibration=())  # to prune again there would be nothing to calibrate on
    again = train(
        tmp_path, resumed, Watch(), seed=5, resume=str(checkpoint), restore_callback_states_from_checkpoint=restore,
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    assert all(torch.equal(weight, whole.model.get_parameter(name)) for name, weight in again.model.named_parameters())
    used = next(one for one in again.callback_handler.callbacks if isinstance(one, PruningCallback))
    assert (used is resumed) == (not restore)
    assert used.report.finetuning_steps == first.report.finetuning_steps == 6
    assert json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["PruningCallback"]

    other = PruningCallback("wanda", "50%", then="finetune")
    with pytest.raises(MaskError, match=r"PruningCallback: .* by another recipe: pattern '2:4' then and '50%' now"):
        train(tmp_path, other, seed=5, resume=str(checkpoint))
    with pytest.raises(MaskError, match=r'\(then="stop"\) has pruned this model already, after step 0'):
        train(tmp_path, PruningCallback(RECIPE), seed=5, resume=str(checkpoint))


def test_a_dense_checkpoint_is_pruned_and_then_trained_on_and_saved(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=3, num_train_epochs=1)
    resumed = finetuning()
    trainer = train(tmp_path, resumed, Watch(), resume=str(tmp_path / "runs" / "checkpoint-3"), save_strategy="epoch")
    assert sparsity(trainer.model) == 0.5
    assert resumed.report.finetuning_steps == 3
    assert resumed.landed["report"]["finetuning_steps"] == 3


def test_a_second_training_goes_on_or_is_refused(tmp_path):
    callback = finetuning()
    model = train(tmp_path, callback, num_train_epochs=1).model
    train(tmp_path, callback, Watch(), model=model, num_train_epochs=1)
    assert callback.report.finetuning_steps == 6
    callback = PruningCallback(RECIPE)
    model = train(tmp_path, callback, num_train_epochs=1).model
    with pytest.raises(MaskError, match="has pruned this model already, after step 3"):
        train(tmp_path, callback, model=model)


# Refused, before anything is trained; or with the weights kept.


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"output": "file/out"}, CheckpointError, "cannot be written"),
        ({"module": "body"}, CalibrationError, r"module='body'.*it has model, lm_head"),
        ({"calibration": []}, CalibrationError, "There are no calibration batches"),
    ],
)
def test_what_cannot_work_is_refused_first(settings, error, match, tmp_path):
    (tmp_path / "file").write_text("")
    if "output" in settings:
        settings = {"output": str(tmp_path / settings["output"])}
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(error, match=match):
        train(tmp_path, finetuning(**settings), model=model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_then_is_one_of_two_words():
    with pytest.raises(RecipeError, match=r"PruningCallback\(then='retrain'\): expected 'stop' or 'finetune'"):
        PruningCallback(then="retrain")


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")])
def test_sharding_is_refused_by_name_when_the_trainer_is_made(name, kind):
    with pytest.raises(SiteError, match=rf"under {kind}, which shards weights.* or DDP"):
        PruningCallback().on_init_end(SimpleNamespace(**{name: True}), None, None, model=tiny_llama())


@pytest.mark.parametrize("then", ["stop", "finetune"])
def test_a_training_that_diverges_is_named_and_kept(then, tmp_path):
    class Diverges(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == state.max_steps:
                model.lm_head.weight.data[0, 0] = torch.nan

    with pytest.raises(
        NonFiniteError, match=r"in the parameter lm_head\.weight\. .* The trained weights are in .*out\.rescued"
    ):
        train(tmp_path, PruningCallback(RECIPE, then=then, output=str(tmp_path / "out")), Diverges())
    assert (tmp_path / "out.rescued" / "model.safetensors").is_file()
