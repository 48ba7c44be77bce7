"""transformers' RoBERTa and XLM-RoBERTa, with any of their heads: blocks and embeddings as in BERT."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaSelfAttention
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer, XLMRobertaSelfAttention

from lightning_nas.supernet.families import families
from lightning_nas.supernet.families._transformers import whole_classes
from lightning_nas.supernet.families._transformers_encoder import EncoderAdapter
from lightning_nas.supernet.families.transformers_bert import BERT

__all__ = ["ROBERTA", "XLM_ROBERTA"]

ROBERTA = replace(
    BERT,
    block=RobertaLayer,
    attention=RobertaSelfAttention,
    inner=(
        "embeddings.LayerNorm",
        "pooler.dense",
        "pooler.activation",
        "lm_head.dense",
        "lm_head.layer_norm",
        "classifier.dense",
    ),
    last=("lm_head.decoder", "lm_head", "classifier.out_proj", "classifier", "qa_outputs"),
)
XLM_ROBERTA = replace(ROBERTA, block=XLMRobertaLayer, attention=XLMRobertaSelfAttention)

for _file, _name, _encoder in (("roberta", "Roberta", ROBERTA), ("xlm_roberta", "XLMRoberta", XLM_ROBERTA)):
    for _network in whole_classes(
        f"{_file}.modeling_{_file}",
        f"{_name}Model",
        f"{_name}ForMaskedLM",
        f"{_name}ForSequenceClassification",
        f"{_name}ForMultipleChoice",
        f"{_name}ForTokenClassification",
        f"{_name}ForQuestionAnswering",
    ):
        families.register(_network)(EncoderAdapter(f"transformers_{_file}", _encoder))
