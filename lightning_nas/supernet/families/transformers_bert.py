"""transformers' BERT, with any of its heads."""

from __future__ import annotations

from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_encoder import Encoder, EncoderAdapter

__all__ = ["BERT"]

BERT = EncoderAdapter(
    "transformers_bert",
    Encoder(
        layers="encoder.layer",
        block=BertLayer,
        attention=BertSelfAttention,
        attention_name="attention.self",
        projections=(
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ),
        attributes={"num_attention_heads": "heads", "all_head_size": "entries"},
        mlp=("intermediate.dense", "output.dense"),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        embeddings=(
            (
                "embeddings.word_embeddings",
                "embeddings.position_embeddings",
                "embeddings.token_type_embeddings",
            ),
            "embeddings.LayerNorm",
        ),
    ),
    heads={
        "{base}pooler.dense": "width",
        "cls.predictions.transform.dense": "width",
        "cls.predictions.transform.LayerNorm": "width",
        "cls.predictions.decoder": None,
        "cls.seq_relationship": None,
        "classifier": None,
        "qa_outputs": None,
    },
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
    families.register(_network)(BERT)
