"""The BERT demo with a tiny network in MiniLM's place, on the real sentences."""

import pandas as pd
import pytest
import torch
from lightning_nas.recipes import demo_bert
from lightning_nas.recipes.sentiment import minilm_folder
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, BertConfig, BertModel

import lightning_nas as nas


@pytest.mark.slow
def test_the_bert_demo_compares_networks_that_load_and_cost_what_it_says(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tiny = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(tiny).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    out = tmp_path / "out"
    demo_bert.main(model=str(tmp_path / "tiny"), sentences=320, lr=1e-3, budget=6, output=str(out))
    said = capsys.readouterr().out
    assert "Fine-tuning on 320 sentences:" in said
    assert "For comparison: 6 random subnetworks" in said
    table = pd.read_csv(out / "networks.csv", index_col="network")
    assert list(table.index) == ["small", "medium", "best", "full"]
    assert table["MMACs"].is_monotonic_increasing
    assert (out / "front.png").stat().st_size > 5_000
    for name in ("small", "medium", "best"):
        network = nas.load(out / name)
        assert sum(p.numel() for p in network.parameters()) == table.loc[name, "parameters"]
        network.config._attn_implementation = "eager"
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.ones(1, 32, dtype=torch.long))
        assert counter.get_total_flops() == pytest.approx(2e6 * table.loc[name, "MMACs"])
