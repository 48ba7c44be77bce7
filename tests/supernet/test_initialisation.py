"""Residual branches that begin at zero."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import lightning_nas as nas
from lightning_nas.supernet import zero_residual_branches
from lightning_nas.testing import randomise


def test_a_resnet_of_zero_branches_is_its_stem_its_shortcuts_and_its_head():
    model = randomise(timm.create_model("resnet26", num_classes=5)).eval()
    names = zero_residual_branches(model)
    assert names == tuple(f"layer{s}.{i}.bn3" for s in (1, 2, 3, 4) for i in (0, 1))
    images = torch.randn(2, 3, 64, 64)
    x = model.maxpool(F.relu(model.bn1(model.conv1(images))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = F.relu(stage[0].downsample(x))
    assert torch.equal(model(images), model.fc(x.mean((2, 3))))


def test_blocks_without_a_shortcut_are_left_alone():
    model = timm.create_model("mobilenetv3_small_050")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    zeroed = zero_residual_branches(model)
    assert all(model.get_submodule(name.rpartition(".")[0]).has_skip for name in zeroed)
    assert sum(bool((norm.weight == 0).all()) for norm in norms) == len(zeroed) > 3


def test_a_network_that_begins_at_zero_learns():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=2, in_chans=1)
    zero_residual_branches(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    labels = torch.arange(16) % 2
    images = torch.randn(16, 1, 32, 32) + labels.view(-1, 1, 1, 1)
    first = None
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert all(model.get_submodule(f"layer{s}.1.bn2").weight.abs().max() > 0 for s in (1, 2, 3, 4))


def test_what_has_no_such_branches_is_refused():
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(nas.UnsupportedError, match="'transformers_bert' does not say where.*yourself"):
        zero_residual_branches(BertModel(tiny))
