import copy
import json
import logging
import math
import random
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from statprune.errors import CalibrationError, ExperimentError
from statprune.experiments.next_line import NEXT_LINE, next_line_questions
from statprune.experiments.shared_context import sharing_contexts
from statprune.experiments.zero_shot import TASKS, ZeroShot, _WithWeights
from tiny_models import changed, snapshot

WORDS = ["rose", "thorn", "river", "stone", "cloud", "meadow", "lantern", "harbour", "winter", "garden"]
_RANDOM = random.Random(0)
DOCUMENTS = [
    {
        "query": f"{number} " + " ".join(_RANDOM.sample(WORDS, 2)),
        "options": [" ".join(_RANDOM.sample(WORDS, _RANDOM.randint(1, 2))) for _ in range(4)],
        "label": _RANDOM.randrange(4),
    }
    for number in range(30)
]


def write_task(folder, documents=DOCUMENTS, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "to-be", "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": "documents.jsonl"}}, "doc_to_text": "{{query}}",
        "doc_to_choice": "{{options}}", "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    path = folder / "to-be.yaml"
    path.write_text(yaml.safe_dump({**task, **settings}))
    return str(path)


def poem(num_lines=60, seed=0):
    """Lines that are all different, of about the same length."""
    generator = random.Random(seed)
    return "\n".join(f"{number}: {' '.join(generator.sample(WORDS, 4))}" for number in range(num_lines))


def choose(model, tokenizer, document, *, per_character=False):
    """Which option has the largest sum of log-likelihoods over its tokens; one forward pass each."""
    scores = []
    for option in document["options"]:
        start = len(tokenizer(document["query"])["input_ids"])
        tokens = tokenizer(f"{document['query']} {option}")["input_ids"]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        score = sum(log_probabilities[place - 1, tokens[place]].item() for place in range(start, len(tokens)))
        scores.append(score / len(option) if per_character else score)
    return scores.index(max(scores))


def accuracy_by_hand(model, tokenizer, documents, **settings):
    right = [choose(model, tokenizer, document, **settings) == document["label"] for document in documents]
    return sum(right) / len(documents)


def accuracies(values):
    """Without their standard errors."""
    return {name: value for name, value in values.items() if not name.endswith("standard error")}


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()


@pytest.fixture(scope="module")
def other_model(model):
    """The same model with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def to_be(tmp_path_factory):
    path = write_task(tmp_path_factory.mktemp("to-be"))
    return ZeroShot([path, f"{path}:acc_norm"])


def test_accuracy_equals_plain_log_likelihood_sums(to_be, model, other_model, tiny_tokenizer):
    for one in (model, other_model):
        acc = accuracy_by_hand(one, tiny_tokenizer, DOCUMENTS)
        acc_norm = accuracy_by_hand(one, tiny_tokenizer, DOCUMENTS, per_character=True)
        expected = {"to-be acc": acc, "to-be acc_norm": acc_norm, "average": (acc + acc_norm) / 2}
        assert accuracies(to_be(one, tiny_tokenizer)) == pytest.approx(expected)


def test_batch_size_changes_no_value(to_be, model, tiny_tokenizer):
    assert to_be(model, tiny_tokenizer, batch_size=5) == to_be(model, tiny_tokenizer, batch_size=1)


def test_weights_are_read_in_place_of_the_models_own(tmp_path, model, other_model, tiny_tokenizer):
    documents = [{**document, "label": choose(other_model, tiny_tokenizer, document)} for document in DOCUMENTS]
    zero_shot = ZeroShot([write_task(tmp_path, documents)])
    model = copy.deepcopy(model).train()
    model.model.layers[0].self_attn.attention_dropout = 0.9
    model.lm_head.eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    dense = zero_shot(model, tiny_tokenizer)
    weights = dict(other_model.named_parameters())
    assert accuracies(zero_shot(model, tiny_tokenizer, weights=weights)) == {"to-be acc": 1.0, "average": 1.0}
    assert changed(model, before) == set()
    assert [module.training for module in model.modules()] == modes
    assert zero_shot(model, tiny_tokenizer) == dense
    assert dense["to-be acc"] < 1


def test_some_weights_are_as_a_model_that_has_them(to_be, model, other_model, tiny_tokenizer):
    name = "model.layers.0.mlp.down_proj.weight"
    mixed = copy.deepcopy(model)
    mixed.get_parameter(name).data.copy_(other_model.get_parameter(name))
    weights = {name: other_model.get_parameter(name)}
    assert to_be(model, tiny_tokenizer, weights=weights) == to_be(mixed, tiny_tokenizer)


REQUESTS = [
    ([5, 6, 7], [8]), ([5, 6], [9, 10]), ([5, 6, 7], [8, 9, 10, 11]), ([5, 6, 7], [12, 13]), ([5], [6]), ([7, 7], [7]),
    ([7, 7], [8]), ([1] * 60, [2] * 4), ([1] * 60, [3] * 5),
]  # fmt: skip
"""Tokens of contexts and choices; the fifth and the second share theirs with nothing."""


class TestSharedContexts:
    """What follows one context is scored with one pass over it."""

    @pytest.fixture
    def read(self, model):
        """The tokens that each forward pass of the model was given."""
        passes = []
        handle = model.register_forward_pre_hook(lambda module, args: passes.append(args[0]))
        yield passes
        handle.remove()

    @staticmethod
    def scores(model, tokenizer, requests, base=None):
        from lm_eval.models.huggingface import HFLM

        scorer = (base or sharing_contexts(HFLM))(
            pretrained=_WithWeights(model, {}), tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=2,
            softmax_dtype="float32",
        )  # fmt: skip
        return scorer._loglikelihood_tokens([(("", ""), *request) for request in requests], disable_tqdm=True)

    def test_scores_are_the_harness_own(self, model, other_model, tiny_tokenizer):
        from lm_eval.models.huggingface import HFLM

        for one in (model, other_model):
            expected = self.scores(one, tiny_tokenizer, REQUESTS, HFLM)
            found = self.scores(one, tiny_tokenizer, REQUESTS)
            assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
            assert [is_likeliest for _, is_likeliest in found] == [is_likeliest for _, is_likeliest in expected]

    def test_a_likeliest_choice_is_told(self, other_model, tiny_tokenizer):
        best = [int(other_model(torch.tensor([[5, 6]])).logits[0, -1].argmax())]
        best.append(int(other_model(torch.tensor([[5, 6, *best]])).logits[0, -1].argmax()))
        found = self.scores(other_model, tiny_tokenizer, [([5, 6], best), ([5, 6], [best[0], best[1] - 1]), ([5, 6], best[:1])])
        assert [is_likeliest for _, is_likeliest in found] == [True, False, True]

    def test_a_context_is_read_once_and_choices_side_by_side(self, model, tiny_tokenizer, read):
        self.scores(model, tiny_tokenizer, [([5, 6, 7], [8, 9]), ([5, 6, 7], [10, 11, 12])])
        assert [tokens.tolist() for tokens in read] == [[[5, 6, 7]], [[8, 9], [10, 11]]]

    def test_what_does_not_fit_the_models_context_is_cut_as_the_harness_does(self, model, tiny_tokenizer, read, monkeypatch):
        monkeypatch.setattr(model.config, "max_position_embeddings", 4)
        self.scores(model, tiny_tokenizer, [([5, 6, 7], [8, 9]), ([5, 6, 7], [10, 11])])
        assert [tokens.tolist() for tokens in read] == [[[5, 6, 7, 8], [5, 6, 7, 10]]]

    def test_a_model_without_a_cache_is_scored_as_the_harness_does(self, model, tiny_tokenizer, monkeypatch):
        expected = self.scores(model, tiny_tokenizer, REQUESTS)
        forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda *args, use_cache=None, **others: SimpleNamespace(logits=forward(*args, **others).logits)
        )
        found = self.scores(model, tiny_tokenizer, REQUESTS)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)

    def test_the_models_setting_of_its_cache_stays(self, to_be, model, tiny_tokenizer):
        to_be(model, tiny_tokenizer, batch_size=8)
        assert model.config.use_cache


def test_standard_errors_are_those_of_shares(tmp_path, model, tiny_tokenizer):
    path = write_task(tmp_path)
    values = ZeroShot([path, f"{path}:acc_norm"], limit=20)(model, tiny_tokenizer)
    errors = [(values[name] * (1 - values[name]) / 19) ** 0.5 for name in ("to-be acc", "to-be acc_norm")]
    assert [values[f"to-be {name} standard error"] for name in ("acc", "acc_norm")] == pytest.approx(errors)
    assert values["average standard error"] == pytest.approx(sum(errors) / 2)  # the same questions
    poems = tmp_path / "poem.txt"
    poems.write_text(poem())
    values = ZeroShot([path, NEXT_LINE], limit=20, text=[poems])(model, tiny_tokenizer)
    errors = [(values[name] * (1 - values[name]) / 19) ** 0.5 for name in ("to-be acc", "next-line acc_norm")]
    assert values["average standard error"] == pytest.approx(math.hypot(*errors) / 2)
    values = ZeroShot([path], limit=1)(model, tiny_tokenizer)
    assert accuracies(values) == values


def test_weights_of_no_parameter_are_refused(to_be, model, tiny_tokenizer):
    with pytest.raises(ExperimentError, match=r"no parameter called layers\.9"):
        to_be(model, tiny_tokenizer, weights={"layers.9": torch.zeros(1)})


def test_a_model_in_half_precision_is_scored_in_float32(tmp_path, other_model, tiny_tokenizer):
    half = copy.deepcopy(other_model).bfloat16()

    def float32_logits(tokens):
        return SimpleNamespace(logits=half(tokens).logits.float())

    documents = [{**document, "label": choose(float32_logits, tiny_tokenizer, document)} for document in DOCUMENTS]
    assert ZeroShot([write_task(tmp_path, documents)])(half, tiny_tokenizer)["to-be acc"] == 1


def test_random_state_tokenizer_logging_and_terminal_are_left_alone(to_be, tmp_path, model, tiny_tokenizer, capfd):
    from lm_eval import utils

    def random_states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    states = random_states()
    templates, tokenizer = utils.env, copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    ZeroShot([write_task(tmp_path)])
    to_be(model, tokenizer)
    to_be.digest()
    assert random_states() == states
    assert utils.env is templates
    assert tokenizer.pad_token is None
    assert logging.root.manager.disable == 0
    assert capfd.readouterr() == ("", "")


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "cache").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "poem.txt").write_text(poem())
    zero_shot = ZeroShot([write_task(tmp_path / "task"), NEXT_LINE], limit=5, text=[tmp_path / "poem.txt"])
    assert list((tmp_path / "cache").iterdir()) == list((tmp_path / "temporary").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "task").iterdir()) == ["documents.jsonl", "to-be.yaml"]
    assert zero_shot.digest()


def test_paths_in_a_task_file_start_where_it_stands(tmp_path, monkeypatch, model, tiny_tokenizer):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options = {"data_files": {"test": ["documents.jsonl", str(tmp_path / "here" / "documents.jsonl")]}}
    write_task(tmp_path / "here", dataset_kwargs=options)
    assert accuracies(ZeroShot(["../here/to-be.yaml"])(model, tiny_tokenizer)).keys() == {"to-be acc", "average"}


def test_limit_takes_the_first_documents(tmp_path, model, tiny_tokenizer):
    values = ZeroShot([write_task(tmp_path)], limit=5)(model, tiny_tokenizer)
    expected = accuracy_by_hand(model, tiny_tokenizer, DOCUMENTS[:5])
    assert values["to-be acc"] == pytest.approx(expected)


def test_digest_stands_for_what_is_asked(tmp_path):
    def digest(number, limit=None, metric="acc", **settings):
        return ZeroShot([f"{write_task(tmp_path / str(number), **settings)}:{metric}"], limit=limit).digest()

    others = [
        digest(2, limit=5),
        digest(3, metric="acc_norm"),
        digest(4, documents=[*DOCUMENTS[:-1], {**DOCUMENTS[-1], "query": "to be 7 and"}]),
        digest(5, doc_to_text="{{query}} so"),
        digest(6, target_delimiter="\n"),
        digest(7, metadata={"version": 2}),
    ]
    assert digest(0) == digest(1)
    assert len({digest(0), *others}) == 7
    assert len(digest(0)) == 16


def test_next_line_questions_of_a_text_known_by_heart():
    lines = poem(60).splitlines()
    questions = next_line_questions("\n".join(lines), number=40)
    for question in questions:
        context, choices = question["context"].splitlines(), question["choices"]
        start = lines.index(context[0])
        assert context == lines[start : start + 8]
        assert choices[question["answer"]] == lines[start + 8]
        assert len(set(choices)) == 4
        assert set(choices) <= set(lines) - set(context)
    assert len({question["context"] for question in questions}) == 40
    answers = Counter(question["answer"] for question in questions)
    assert set(answers) == {0, 1, 2, 3}
    assert max(answers.values()) < 20


def test_next_line_repeats_with_its_seed():
    assert next_line_questions(poem(), number=9, seed=3) == next_line_questions(poem(), number=9, seed=3)
    assert next_line_questions(poem(), number=9, seed=3) != next_line_questions(poem(), number=9, seed=4)


def test_next_line_passes_over_blank_lines_rules_and_repeated_lines():
    text = "\n".join(f"{line}\n\n{'-' * 40}\nevery second stanza ends like this" for line in poem(40).splitlines())
    for question in next_line_questions(text, number=20):
        assert len(set(question["choices"])) == 4
        assert all(sum(map(str.isalnum, choice)) > 8 for choice in question["choices"])


def test_next_line_wraps_prose():
    words = random.Random(0).choices(WORDS, k=2000)
    questions = next_line_questions("  " + " ".join(words), number=20)
    for question in questions:
        for line in [*question["context"].splitlines(), *question["choices"]]:
            assert line.startswith("  ")
            assert len(line) <= 72


@pytest.mark.parametrize("text", ["", "one line", poem(8), "the same line again\n" * 500], ids=["no", "one", "eight", "same"])
def test_next_line_of_too_short_a_text_is_refused(text):
    with pytest.raises(ExperimentError, match=r"enough for 0 questions, wanted: 100\. Give more text"):
        next_line_questions(text, number=100)
    with pytest.raises(ExperimentError, match=r"wanted: 1\. Give more text"):
        next_line_questions(text)


def test_next_line_without_a_number_asks_what_the_text_is_enough_for(monkeypatch):
    few = next_line_questions(poem(40))
    assert 20 < len(few) < 40
    monkeypatch.setattr("statprune.experiments.next_line.USUAL_NUMBER", 9)
    assert next_line_questions(poem(40)) == few[:9]


def test_next_line_goes_through_the_harness(tmp_path, model, tiny_tokenizer):
    (tmp_path / "poem.txt").write_text(poem(40))
    tasks, text = [NEXT_LINE, f"{NEXT_LINE}:acc"], [tmp_path / "poem.txt"]
    zero_shot = ZeroShot(tasks, text=text, limit=12)
    values = accuracies(zero_shot(model, tiny_tokenizer, batch_size=4))
    assert values.keys() == {"next-line acc_norm", "next-line acc", "average"}
    assert {12 * value for value in values.values() if value != values["average"]} <= set(range(13))
    assert ZeroShot(tasks, text=text, limit=12).digest() == zero_shot.digest()
    assert ZeroShot(tasks, text=text, limit=12, seed=1).digest() != zero_shot.digest()


def test_next_line_says_what_text_it_needs(tmp_path):
    with pytest.raises(ExperimentError, match="next-line is made from text: give one text file"):
        ZeroShot([NEXT_LINE])
    with pytest.raises(CalibrationError, match=r"missing\.txt"):
        ZeroShot([NEXT_LINE], text=[tmp_path / "missing.txt"])


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ExperimentError, match=r"No task is called 'hellaswagg'\. Did you mean 'hellaswag'\?"):
        ZeroShot(["hellaswagg"])


def test_the_papers_tasks_without_a_connection_say_what_to_provide(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ExperimentError, match=r"The task boolq .* data set '\S+ boolq'.* connection .* copy .* NAME.yaml"):
        ZeroShot([*TASKS])


def test_tasks_of_the_harness_by_name(monkeypatch, model, tiny_tokenizer):
    """A template, a function of the harness' own, and a file that includes another one."""
    import datasets

    documents = {
        "aps/super_glue": {"passage": "To be.", "question": "is it", "label": 1},
        "allenai/winogrande": {"sentence": "A _ is.", "option1": "rose", "option2": "stone", "answer": "1"},
        "allenai/ai2_arc": {"question": "What?", "choices": {"text": ["rose", "stone"], "label": ["A", "B"]}, "answerKey": "B"},
    }

    def load(path, name, **settings):
        data = datasets.Dataset.from_list([documents[path]] * 3)
        return datasets.DatasetDict(train=data, validation=data, test=data)

    monkeypatch.setattr(datasets, "load_dataset", load)
    zero_shot = ZeroShot(["boolq", "winogrande", "arc_challenge:acc_norm"], limit=2)
    values = accuracies(zero_shot(model, tiny_tokenizer))
    assert values.keys() == {"boolq acc", "winogrande acc", "arc_challenge acc_norm", "average"}
    assert set(values.values()) - {values["average"]} <= {0.0, 1.0}
    assert len(zero_shot.digest()) == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class": "code.Task"}, "has class.* No code"),
        ({"custom_dataset": "code.load"}, "has custom_dataset.* No code"),
        ({"include": "other.yaml"}, "has include.* No code"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "has dataset_kwargs: trust_remote_code.* No code"),
        ({"dataset_path": "code/load.py"}, "has dataset_path: code/load.py.* No code"),
        ({"dataset_path": "pandas"}, "has dataset_path: pandas.* No code"),
        ({"metric_list": [{"metric": "code.py"}]}, "has metric: code.py.* No code"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "has metric: acc.* No code"),
        ({"doc_to_text": "{{ query.__class__.__mro__ }}"}, "cannot be loaded: SecurityError"),
        ({"doc_to_text": "{{ nothing }}"}, "cannot be loaded: UndefinedError"),
        ({"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}}, r"loaded: FileNotFoundError.* json: .*missing"),
        ({"output_type": "generate_until"}, "not one"),
        ({"task": ["boolq", "rte"]}, "has task"),
        ({"metric_list": "acc"}, "cannot be read"),
    ],
)  # fmt: skip
def test_a_task_file_that_asks_for_code_or_cannot_be_used_is_refused(tmp_path, settings, message):
    with pytest.raises(ExperimentError, match=message):
        ZeroShot([write_task(tmp_path, **settings)])


def test_a_function_beside_a_task_file_is_not_run(tmp_path):
    (tmp_path / "code.py").write_text("open('was-run', 'w')\ndef query(document): return ''\n")
    path = write_task(tmp_path)
    with open(path, "a") as file:
        file.write("description: !function code.query\n")
    with pytest.raises(ExperimentError, match=r"'!function'.* No code that comes with a task is run"):
        ZeroShot([path])
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"[1, 2]", b"", b"a: b: c", b"task: x\n"])
def test_a_file_that_is_no_task_is_refused(tmp_path, content):
    path = tmp_path / "task.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExperimentError, match=r"task\.yaml cannot be read"):
        ZeroShot([str(path)])


def test_an_unknown_metric_names_the_known_ones(tmp_path):
    with pytest.raises(ExperimentError, match=r"\['acc', 'acc_norm'\], and not perplexity"):
        ZeroShot([f"{write_task(tmp_path)}:perplexity"])


def test_two_tasks_of_one_name_and_no_tasks_are_refused(tmp_path):
    with pytest.raises(ExperimentError, match="Two tasks are called 'to-be'"):
        ZeroShot([write_task(tmp_path / "one"), write_task(tmp_path / "two")])
    path = write_task(tmp_path / "one")
    for tasks, limit in ([], None), ([path, path], None), ([path], 0):
        with pytest.raises(ExperimentError, match="expected different tasks, and a limit of 1 or more"):
            ZeroShot(tasks, limit=limit)


def test_without_the_harness_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ExperimentError, match=r"pip install 'statprune\[zero-shot\]'"):
        ZeroShot(["boolq"])
