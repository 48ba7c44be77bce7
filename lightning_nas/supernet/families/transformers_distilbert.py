"""transformers' DistilBERT, with any of its heads."""

from __future__ import annotations

from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention, TransformerBlock

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_encoder import Encoder, EncoderAdapter

__all__ = ["DISTILBERT"]

DISTILBERT = Encoder(
    block=TransformerBlock,
    attention=DistilBertSelfAttention,
    layers="transformer.layer",
    attention_name="attention",
    heads="n_heads",
    projections=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    mlp=("ffn.lin1", "ffn.lin2"),
    norms=("sa_layer_norm", "output_layer_norm"),
    tables=("embeddings.word_embeddings", "embeddings.position_embeddings"),
    inner=("embeddings.LayerNorm", "vocab_transform", "vocab_layer_norm", "pre_classifier"),
    last=("vocab_projector", "classifier", "qa_outputs"),
    units="hidden_dim",
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
    families.register(_network)(EncoderAdapter("transformers_distilbert", DISTILBERT))
