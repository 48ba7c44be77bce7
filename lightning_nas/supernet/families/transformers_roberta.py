"""transformers' RoBERTa, with any of its heads: blocks and embeddings as in BERT."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaSelfAttention

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_encoder import EncoderAdapter
from lightning_nas.supernet.families.transformers_bert import BERT

__all__ = ["ROBERTA"]

ROBERTA = EncoderAdapter(
    "transformers_roberta",
    replace(BERT.encoder, block=RobertaLayer, attention=RobertaSelfAttention),
    heads={
        "{base}pooler.dense": "width",
        "lm_head.dense": "width",
        "lm_head.layer_norm": "width",
        "lm_head.decoder": None,
        "classifier.dense": "width",
        "classifier.out_proj": None,
        "classifier": None,
        "qa_outputs": None,
    },
)

for _network in whole_classes(
    "roberta.modeling_roberta",
    "RobertaModel",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaForMultipleChoice",
    "RobertaForTokenClassification",
    "RobertaForQuestionAnswering",
):
    families.register(_network)(ROBERTA)
