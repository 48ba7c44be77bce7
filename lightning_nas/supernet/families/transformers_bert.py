"""transformers' BERT, with any of its heads."""

from __future__ import annotations

from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_encoder import Encoder, EncoderAdapter

__all__ = ["BERT"]

BERT = Encoder(
    block=BertLayer,
    attention=BertSelfAttention,
    layers="encoder.layer",
    attention_name="attention.self",
    heads="num_attention_heads",
    projections=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ),
    mlp=("intermediate.dense", "output.dense"),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    tables=(
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
    ),
    inner=(
        "embeddings.LayerNorm",
        "pooler.dense",
        "pooler.activation",
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
    ),
    last=("cls.predictions.decoder", "cls.predictions", "cls.seq_relationship", "classifier", "qa_outputs"),
)

for _network in whole_classes(
    "bert.modeling_bert",
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
):
    families.register(_network)(EncoderAdapter("transformers_bert", BERT))
