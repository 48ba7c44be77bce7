"""transformers' DistilBERT, with any of its heads."""

from __future__ import annotations

from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention, TransformerBlock

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_encoder import Encoder, EncoderAdapter

__all__ = ["DISTILBERT"]

DISTILBERT = EncoderAdapter(
    "transformers_distilbert",
    Encoder(
        layers="transformer.layer",
        block=TransformerBlock,
        attention=DistilBertSelfAttention,
        attention_name="attention",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        attributes={"n_heads": "heads"},
        mlp=("ffn.lin1", "ffn.lin2"),
        norms=("sa_layer_norm", "output_layer_norm"),
        embeddings=(
            ("embeddings.word_embeddings", "embeddings.position_embeddings"),
            "embeddings.LayerNorm",
        ),
        config=("n_layers", "dim", "n_heads", "hidden_dim"),
    ),
    heads={
        "vocab_transform": "width",
        "vocab_layer_norm": "width",
        "vocab_projector": None,
        "pre_classifier": "width",
        "classifier": None,
        "qa_outputs": None,
    },
)

for _network in whole_classes(
    "distilbert.modeling_distilbert",
    "DistilBertModel",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForQuestionAnswering",
    "DistilBertForTokenClassification",
    "DistilBertForMultipleChoice",
):
    families.register(_network)(DISTILBERT)
