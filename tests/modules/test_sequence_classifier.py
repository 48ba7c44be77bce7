import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning_nas.callbacks import InstaTune
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch import nn
from torch.utils.data import DataLoader

from lightning_nas.modules import GLUE, SequenceClassifier, layer_distances, mean_pool, warmup_linear

transformers = pytest.importorskip("transformers")
VOCABULARY = 40
TINY = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "vocab_size": VOCABULARY, "max_position_embeddings": 32,
}  # fmt: skip
KINDS = {
    "bert": TINY,
    "roberta": {**TINY, "model_type": "roberta", "pad_token_id": 1},
    "distilbert": {
        "model_type": "distilbert", "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
        "vocab_size": VOCABULARY, "max_position_embeddings": 32,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY,
        "n_positions": 32, "pad_token_id": 0,
    },
}  # fmt: skip
WORDS = ["good", "bad", "film", "plot", "long", "the"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained network and its tokenizer as a user has them: files in a folder."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("tiny_bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (place / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    network = transformers.BertModel(bert_config())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    network.save_pretrained(place)
    return place


def bert_config(**settings):
    return transformers.AutoConfig.for_model(**{**TINY, **settings})


def classifier(**settings):
    return SequenceClassifier(**{"config": TINY, "num_labels": 3, "max_length": 32, **settings})


def rows(size=24, labels=3, seed=0):
    """Sentences of 3 to 7 tokens, padded to 7."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 11, (size, 7), generator=generator)
    lengths = torch.randint(3, 8, (size, 1), generator=generator)
    mask = (torch.arange(7) < lengths).long()
    wanted = (
        torch.randn(size, generator=generator)
        if labels == 1
        else torch.randint(labels, (size,), generator=generator)
    )
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": wanted}


def loader(batch_size=8, shuffle=False, **settings):
    columns = rows(**settings)
    number = len(columns["labels"])
    items = [{name: column[i] for name, column in columns.items()} for i in range(number)]
    return DataLoader(items, batch_size=batch_size, shuffle=shuffle)


def trainer(tmp_path, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    return pl.Trainer(**{**quiet, **settings})


def logits_of(module, columns):
    with torch.no_grad():
        return module.eval()(**{k: v for k, v in columns.items() if k != "labels"})


class Rates(pl.Callback):
    """The learning rate that each optimizer step used."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


# --- what it does with a Trainer


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_trains_validates_tests_and_predicts(tmp_path, kind, pooling):
    module, run = classifier(config=KINDS[kind], pooling=pooling), trainer(tmp_path, max_epochs=1)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    run.fit(module, loader(7), loader())
    assert set(run.callback_metrics) == {"train_loss", "val_loss", "val_acc"}
    unmoved = [name for name, p in module.named_parameters() if torch.equal(p, before[name])]
    assert [name for name in unmoved if "token_type" not in name and "word" not in name] == []
    run.test(module, loader(), verbose=False)
    assert set(run.callback_metrics) == {"test_loss", "test_acc"}
    assert torch.cat(run.predict(module, loader())).shape == (24, 3)


def test_training_lowers_the_loss_of_a_sentiment_that_one_word_decides(tmp_path, folder):
    pl.seed_everything(0)
    texts = [f"the film {'good' if i % 2 else 'bad'} {'long ' * (i % 3)}plot" for i in range(48)]
    pairs = DataLoader([(text, i % 2) for i, text in enumerate(texts)], batch_size=8, shuffle=True)
    module = SequenceClassifier(folder, num_labels=2, pooling="mean", max_length=16, lr=1e-2)
    run = trainer(tmp_path, max_epochs=6)
    before = trainer(tmp_path).validate(module, pairs, verbose=False)[0]
    run.fit(module, pairs, pairs)
    assert run.callback_metrics["val_loss"] < before["val_loss"] / 4
    assert run.callback_metrics["val_acc"] == 1


def test_training_continues_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    still = {**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    whole, again = (classifier(config=still, pooling="mean", lr=1e-3) for _ in range(2))
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[keep]).fit(whole, loader())
    run = trainer(tmp_path, max_epochs=3)
    run.fit(again, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert run.global_step == 9
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("batch_size", [24, 7])
def test_logged_numbers_are_those_of_scikit_learn_over_all_sentences(tmp_path, batch_size):
    for labels, names in [(2, ["accuracy", "f1", "matthews"]), (3, ["accuracy", "f1", "matthews"])]:
        module, columns = classifier(num_labels=labels, metrics=names), rows(labels=labels)
        found = trainer(tmp_path).validate(module, loader(batch_size, labels=labels), verbose=False)[0]
        logits, truth = logits_of(module, columns), columns["labels"]
        answers = logits.argmax(1)
        average = "binary" if labels == 2 else "macro"
        assert found == {
            "val_loss": pytest.approx(F.cross_entropy(logits, truth).item(), rel=1e-5),
            "val_acc": pytest.approx(sklearn_metrics.accuracy_score(truth, answers)),
            "val_f1": pytest.approx(sklearn_metrics.f1_score(truth, answers, average=average)),
            "val_matthews": pytest.approx(sklearn_metrics.matthews_corrcoef(truth, answers), abs=1e-6),
        }


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_one_label_is_regression_by_the_squared_error_with_both_correlations(tmp_path, pooling):
    module, columns = classifier(num_labels=1, pooling=pooling), rows(labels=1)
    found = trainer(tmp_path).validate(module, loader(7, labels=1), verbose=False)[0]
    answers, truth = logits_of(module, columns)[:, 0].numpy(), columns["labels"].numpy()
    assert found == {
        "val_loss": pytest.approx(np.square(answers - truth).mean(), rel=1e-4),
        "val_pearson": pytest.approx(stats.pearsonr(answers, truth).statistic, abs=1e-4),
        "val_spearman": pytest.approx(stats.spearmanr(answers, truth).statistic, abs=1e-4),
    }


def test_a_regression_learns_the_number_of_good_words(tmp_path):
    pl.seed_everything(0)
    columns = rows(64)
    good = ((columns["input_ids"] == 5).sum(1) - 1).float()
    data = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(
        columns["input_ids"], columns["attention_mask"], good, strict=True)]  # fmt: skip
    loaded = DataLoader(data, batch_size=16, shuffle=True)
    module = classifier(num_labels=1, pooling="mean", lr=2e-2)
    run = trainer(tmp_path, max_epochs=10)
    run.fit(module, loaded, loaded)
    assert run.callback_metrics["val_pearson"] > 0.9


@pytest.mark.parametrize("task", GLUE)
def test_a_task_of_glue_brings_its_labels_and_metrics(tmp_path, task):
    labels, names = GLUE[task]
    module = classifier(metrics=task, num_labels=None)
    found = trainer(tmp_path).validate(module, loader(labels=labels), verbose=False)[0]
    logged = {"accuracy": "acc"}
    assert set(found) == {"val_loss", *(f"val_{logged.get(name, name)}" for name in names)}
    assert module.model.config.num_labels == labels


# --- the network and its pooling


def test_without_pooling_the_logits_are_those_of_transformers_alone(folder):
    module, columns = SequenceClassifier(folder, num_labels=3, max_length=32), rows()
    plain = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    plain.classifier.load_state_dict(module.model.classifier.state_dict())
    inputs = {k: v for k, v in columns.items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(logits_of(module, columns), plain(**inputs).logits)


def test_mean_pooling_reads_every_sentence_as_if_it_stood_alone_without_padding(folder):
    module, columns = SequenceClassifier(folder, num_labels=3, pooling="mean", max_length=32), rows()
    plain = transformers.BertModel.from_pretrained(folder).eval()
    logits, (_, linear) = logits_of(module, columns), module.head
    for i, (ids, mask) in enumerate(zip(columns["input_ids"], columns["attention_mask"], strict=True)):
        with torch.no_grad():
            hidden = plain(input_ids=ids[mask.bool()][None]).last_hidden_state
            torch.testing.assert_close(logits[i], linear(hidden[0].mean(0)), rtol=1e-4, atol=1e-5)


def test_the_mean_of_tokens_leaves_padding_out_and_survives_a_row_of_nothing_else():
    hidden, mask = torch.randn(3, 4, 2), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0), torch.zeros(2)])
    torch.testing.assert_close(mean_pool(hidden, mask), expected)
    torch.testing.assert_close(mean_pool(hidden), hidden.mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_with_mean_pooling(kind):
    module, columns = classifier(config=KINDS[kind], pooling="mean"), rows()
    logits = module(**{k: v for k, v in columns.items() if k != "labels"})
    module.loss(logits, columns["labels"]).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_the_network_is_called_once_a_step_with_keywords_and_without_labels(pooling):
    module, calls = classifier(pooling=pooling), []
    module.model.register_forward_hook(
        lambda network, args, kwargs, output: calls.append((args, set(kwargs))), with_kwargs=True
    )
    module.log = lambda *args, **kwargs: None
    module.training_step({**rows(), "idx": torch.arange(24)}, 0)  # the data's own numbers are passed over
    assert calls == [((), {"input_ids", "attention_mask"})]
    networks = [m for m in module.modules() if isinstance(m, transformers.PreTrainedModel)]
    assert networks == [module.model] if pooling else [module.model, module.model.bert]


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_a_network_of_ones_own_is_trained_as_it_is(tmp_path, pooling):
    kind = transformers.BertModel if pooling else transformers.BertForSequenceClassification
    network, twin = kind(bert_config(num_labels=3)), kind(bert_config(num_labels=3))
    module, run = classifier(model=network, config=None, pooling=pooling), trainer(tmp_path, max_epochs=1)
    assert module.model is network
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "it.ckpt", model=twin)
    assert torch.equal(logits_of(again, rows()), logits_of(module, rows()))


def test_weights_stored_in_half_precision_are_trained_in_single(tmp_path):
    transformers.BertModel(bert_config()).half().save_pretrained(tmp_path)
    module = SequenceClassifier(tmp_path, num_labels=2, max_length=32)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


# --- with the callbacks


@pytest.mark.filterwarnings("ignore:.*is better than of the largest")  # so short a run says nothing
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_a_search_finds_networks_that_give_in_this_module_what_it_measured(tmp_path, folder, pooling):
    texts = [f"the film {'good' if i % 3 else 'bad'} {'long ' * (i % 5)}plot" for i in range(32)]
    loaded = DataLoader([(text, int(i % 3 > 0)) for i, text in enumerate(texts)], batch_size=8)
    module = SequenceClassifier(folder, num_labels=2, pooling=pooling, max_length=16, lr=1e-2)
    instatune = InstaTune(budget=4, folder=tmp_path / "search")
    trainer(tmp_path, max_epochs=2, callbacks=[instatune]).fit(module, loaded, loaded)
    kind = transformers.BertModel if pooling else transformers.BertForSequenceClassification
    for candidate in instatune.result.candidates:
        module.model = instatune.extract(candidate)
        assert type(module.model) is kind
        found = trainer(tmp_path).validate(module, loaded, verbose=False)[0]
        assert found["val_loss"] == pytest.approx(candidate.values["val_loss"], rel=1e-4)
        assert found["val_acc"] == candidate.values["val_acc"]


# --- batches of text


def test_text_gives_the_logits_of_its_tokens(tmp_path, folder):
    module = SequenceClassifier(folder, num_labels=2, max_length=6)
    texts, labels = ["the film good", "the plot the plot the plot bad"], torch.tensor([1, 0])
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=6, return_tensors="pt"
    )
    expected = logits_of(module, tokens)
    assert tokens["input_ids"].shape == (2, 6)
    for batch in (
        {"text": texts, "labels": labels}, {"text": tuple(texts), "label": labels}, {"text": texts},
        (texts, labels), [tuple(texts), [1, 0]], texts,
    ):  # fmt: skip
        run = trainer(tmp_path)
        (found,) = run.predict(module, DataLoader([batch], batch_size=None))
        assert torch.equal(found, expected)


def test_pairs_of_texts_reach_the_network_as_pairs(tmp_path, folder):
    module = SequenceClassifier(folder, metrics="mrpc", max_length=16)
    texts, pairs = ["good film", "bad plot"], ["the film good", "the plot long bad"]
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, pairs, padding=True, return_tensors="pt"
    )
    assert tokens["token_type_ids"].sum() > 0
    batch = {"text": texts, "text_pair": pairs, "labels": torch.tensor([1, 0])}
    found = trainer(tmp_path).predict(module, DataLoader([batch], batch_size=None))
    assert torch.equal(found[0], logits_of(module, tokens))
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, DataLoader([batch], batch_size=None))
    assert run.callback_metrics["train_loss"] > 0


def test_tokens_that_are_there_are_not_made_again_from_the_text_beside_them(tmp_path):
    module, columns = classifier(), rows()  # it has no tokenizer to make them with
    batch = {**columns, "text": ["the film"] * 24}
    (found,) = trainer(tmp_path).predict(module, DataLoader([batch], batch_size=None))
    assert torch.equal(found, logits_of(module, columns))


# --- learning rates


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (4, 4), (0.25, 3)])
def test_the_rate_follows_the_closed_form_at_every_optimizer_step(tmp_path, warmup, steps):
    rates, module = Rates(), classifier(lr=0.01, warmup=warmup)
    trainer(tmp_path, max_epochs=4, callbacks=[rates]).fit(module, loader())  # 4 epochs of 3 batches
    rise = [0.01 * (t + 1) / steps for t in range(steps)]
    fall = [0.01 * (1 - t / (12 - steps)) for t in range(12 - steps)]
    assert rates.seen == pytest.approx(rise + fall)


def test_without_warmup_the_rate_is_that_of_transformers_own_linear_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, 0, 10)
    for step in range(10):
        assert theirs.get_last_lr()[0] == pytest.approx(warmup_linear(step, 0, 10))
        optimizer.step()
        theirs.step()


def test_the_factor_never_leaves_zero_to_one():
    for warmup, total in [(0, 1), (3, 3), (5, 3), (2, 50)]:
        assert all(0 <= warmup_linear(step, warmup, total) <= 1 for step in range(60))


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_further_from_the_output_learn_slower_by_the_decay(kind, pooling):
    module = classifier(config=KINDS[kind], pooling=pooling, lr=0.1, layer_decay=0.5, weight_decay=0.2)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in module.parameter_groups() for p in g["params"]}
    assert len(found) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        layer = re.search(r"\.(?:layer|h)\.(\d)\.", name)
        is_first = re.search("embeddings|wte|wpe", name)
        distance = 2 - int(layer[1]) if layer else 3 if is_first else 0
        assert found[id(parameter)] == (0.1 * 0.5**distance, 0.2 if parameter.ndim > 1 else 0.0), name


def test_frozen_parameters_are_left_to_themselves():
    module = classifier()
    module.model.bert.embeddings.requires_grad_(False)
    grouped = {id(p) for group in module.parameter_groups() for p in group["params"]}
    assert grouped == {id(p) for p in module.parameters() if p.requires_grad}


def test_distances_count_from_the_output_to_the_embedding():
    network = transformers.BertForSequenceClassification(bert_config(num_hidden_layers=4))
    distances = layer_distances(network)
    assert distances["bert.embeddings.word_embeddings.weight"] == 5
    assert distances["bert.encoder.layer.0.output.dense.weight"] == 4
    assert distances["bert.encoder.layer.3.attention.self.query.bias"] == 1
    assert distances["bert.pooler.dense.weight"] == distances["classifier.weight"] == 0


# --- checkpoints, configuration, imports


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_a_checkpoint_alone_brings_the_classifier_back_and_downloads_nothing(tmp_path, folder, pooling):
    module = SequenceClassifier(folder, metrics="sst2", pooling=pooling, max_length=32, lr=0.003)
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
    run.fit(module, loader(labels=2))
    path = run.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=False)
    saved["hyper_parameters"]["model"] = "a-name/that-nobody-can-download"
    torch.save(saved, tmp_path / "moved.ckpt")
    again = SequenceClassifier.load_from_checkpoint(tmp_path / "moved.ckpt")
    assert torch.equal(logits_of(again, rows()), logits_of(module, rows()))
    assert (again.lr, again.num_labels, again.pooling) == (0.003, 2, pooling)
    assert module.hparams["config"] is None


def test_a_checkpoint_needs_no_unpickling_of_ours(tmp_path, folder):
    module = SequenceClassifier(
        folder, tokenizer=folder, num_labels=2, metrics=["accuracy", "f1"], max_length=8
    )
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, loader(labels=2))
    run.save_checkpoint(tmp_path / "it.ckpt")
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)["hyper_parameters"]
    given = [saved[name] for name in ("model", "tokenizer", "metrics")]
    assert given == [str(folder), str(folder), ["accuracy", "f1"]]


def test_a_subclass_may_override_any_step(tmp_path):
    class Mine(SequenceClassifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("twice", 2 * loss)
            return 2 * loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    run = trainer(tmp_path, max_steps=1)
    run.fit(Mine(config=TINY, num_labels=3, max_length=32), loader())
    assert run.callback_metrics["twice"] == 2 * run.callback_metrics["train_loss"]
    assert type(run.optimizers[0]) is torch.optim.SGD


YAML = """
model:
  class_path: lightning_nas.modules.SequenceClassifier
  init_args: {{model: {folder}, metrics: sst2, pooling: mean, max_length: 8, warmup: 5}}
data:
  class_path: lightning_nas.recipes.sentiment.SentimentData
  init_args: {{tokenizer: {folder}, batch_size: 4, max_length: 8, test: 43}}
trainer:
  max_epochs: 1
  limit_train_batches: 2
  limit_val_batches: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_the_command_line_builds_and_runs_it_from_yaml(tmp_path, folder):
    cli = pytest.importorskip("pytorch_lightning.cli")
    pytest.importorskip("jsonargparse")
    Path("it.yaml").write_text(YAML.format(folder=folder))
    built = cli.LightningCLI(args=["fit", "--config", "it.yaml"], save_config_callback=None)
    assert (built.model.num_labels, built.model.pooling, built.model.warmup) == (2, "mean", 5)
    assert built.trainer.global_step == 2
    assert {"val_loss", "val_acc"} <= set(built.trainer.callback_metrics)


@pytest.mark.slow
def test_importing_the_modules_brings_no_more_of_transformers_than_lightning_does():
    code = (
        "import sys, pytorch_lightning; before = set(sys.modules)\n"  # torchmetrics looks for it
        "import lightning_nas.modules; print(*(set(sys.modules) - before))"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert [name for name in ran.stdout.split() if name.startswith("transformers")] == []


# --- what is refused


def bert(kind="BertForSequenceClassification", **settings):
    return getattr(transformers, kind)(bert_config(**settings))


REFUSED = [
    ({"num_labels": 0}, "num_labels must be at least 1, got 0"),
    ({"num_labels": None}, "give num_labels .* or as metrics a task of GLUE: cola, sst2"),
    ({"pooling": "max"}, "pooling must be None or 'mean', got 'max'"),
    ({"max_length": 0}, "max_length must be at least 1"),
    ({"max_length": 33}, "max_length=33, but the network has 32 positions"),
    ({"lr": 0}, "lr must be above 0"),
    ({"weight_decay": -1}, "weight_decay must be at least 0"),
    ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\]"),
    ({"warmup": 1.0}, "warmup must be a share"),
    ({"lr": -1, "warmup": -1}, "lr must be above 0, got -1; warmup must be"),
    ({"metrics": "acuracy"}, "unknown metric 'acuracy'. Did you mean 'accuracy'"),
    ({"metrics": ["accuracy", "stt2"]}, "unknown metric 'stt2'. Did you mean 'sst2'"),
    ({"metrics": "pearson"}, "'pearson' does not fit num_labels=3; these do: accuracy, f1, matthews"),
    ({"metrics": "f1", "num_labels": 1}, "'f1' does not fit num_labels=1; these do: pearson, spearman"),
    ({"metrics": "stsb"}, "num_labels=3, but the task 'stsb' has 1"),
    ({"config": {"hidden_size": 8}}, 'config needs a "model_type"'),
    ({"model": bert(num_labels=3)}, "config and model_kwargs are for a name"),
    ({"model": bert(num_labels=2), "config": None}, "num_labels=3, but the network you gave has 2"),
    ({"model": bert("BertModel"), "config": None}, "BertModel has no head. Use pooling='mean'"),
    (
        {"model": bert(num_labels=3), "config": None, "pooling": "mean"},
        "BertForSequenceClassification has one. Give network.base_model",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_bad_arguments_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        classifier(**settings)


def test_a_model_that_is_no_transformers_network_is_a_type_error():
    with pytest.raises(TypeError, match="got Linear"):
        SequenceClassifier(nn.Linear(2, 2), num_labels=2)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_is_refused_before_the_first_step(
    tmp_path, folder
):
    module = classifier(config={**TINY, "vocab_size": 10}, tokenizer=folder)
    with pytest.raises(ValueError, match="the tokenizer has 11 tokens, but the network's embedding only 10"):
        trainer(tmp_path, max_epochs=1).fit(module, loader())
    assert module.trainer.global_step == 0


def test_tokens_of_another_tokenizer_are_refused_at_first_sight(tmp_path):
    module = classifier(config={**TINY, "vocab_size": 10})
    with pytest.raises(ValueError, match="a batch has token 10, but the network's embedding has 10 rows"):
        trainer(tmp_path, max_epochs=1).fit(module, loader())


def test_text_without_a_tokenizer_is_refused_with_the_remedy(tmp_path):
    module = classifier(model=bert(num_labels=3), config=None)
    with pytest.raises(ValueError, match=r"needs a tokenizer.* Give tokenizer="):
        trainer(tmp_path).predict(module, DataLoader([["the film"]], batch_size=None))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"labels must be 0 to 2 with num_labels=3, got \[0, 3\]"),
        (torch.tensor([-1, 2]), r"labels must be 0 to 2 with num_labels=3, got \[-1, 2\]"),
        (torch.tensor([0.0, 1.0]), "must be whole numbers, got torch.float32. Use num_labels=1"),
        (torch.tensor([[0], [1]]), r"labels must be \(batch,\), got \(2, 1\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused_where_they_are_first_seen(tmp_path, labels, message):
    batch = {**rows(2), "labels": labels}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_epochs=1).fit(classifier(), DataLoader([batch], batch_size=None))


def test_labels_are_not_looked_at_to_predict(tmp_path):
    batch = {**rows(2), "labels": torch.tensor([-1, -1])}  # as the test sets of GLUE have them
    (found,) = trainer(tmp_path).predict(classifier(), DataLoader([batch], batch_size=None))
    assert found.shape == (2, 3)


@pytest.mark.parametrize("batch", [{"pixels": 1}, torch.zeros(2), (1, 2, 3)])
def test_a_batch_of_another_form_is_refused_with_the_forms_that_work(batch):
    with pytest.raises(ValueError, match="a batch must be a dictionary of a tokenizer's tensors"):
        classifier().validation_step(batch, 0)


def test_a_batch_without_labels_is_refused():
    batch = {name: tensor for name, tensor in rows().items() if name != "labels"}
    with pytest.raises(ValueError, match="the batch has no labels"):
        classifier().validation_step(batch, 0)


def test_a_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs the length of the run"):
        trainer(tmp_path, max_epochs=-1).fit(classifier(), loader())
