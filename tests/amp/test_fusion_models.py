"""Which activations are fused in models that people use; none of them changes a value."""

import copy
import importlib
import importlib.util
import pickle
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from fastmp.amp.fusion import fuse_linear, unfuse_linear
from tests.amp.fusion_cases import assert_unchanged, chain, fused, recomputed

pytestmark = pytest.mark.usefixtures("every_size")

WIDTHS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip


def timm_mlp(**options):
    """timm.layers needs torchvision, its mlp.py alone does not."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed: pip install 'fastmp[interop]'")
    package = types.ModuleType("timm_layers")
    package.__path__ = [str(Path(spec.origin).parent / "layers")]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module("timm_layers.mlp").Mlp(4, 8, 3, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["after gelu"]),
        ({"act_layer": nn.SiLU}, ["after silu"]),
        ({"norm_layer": nn.LayerNorm}, ["after gelu"]),
        ({"act_layer": nn.ReLU}, []),  # torch's pass takes less than a call
    ],
)
def test_timms_mlp(options, expected):
    assert assert_unchanged(timm_mlp(**options), torch.randn(5, 4)) == expected


def test_timms_mlp_in_blocks():
    """Blocks as in its VisionTransformer: called in a loop, with an option in their forward."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(4), timm_mlp()
            self.mlp.fc2 = nn.Linear(8, 4)

        def forward(self, x, mask=None):
            return x + self.mlp(self.norm(x if mask is None else x * mask))

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x, mask=None):
            if mask is None and x.dim() == 2:
                return self.blocks(x)
            for block in self.blocks:
                x = block(x, mask)
            return x

    assert assert_unchanged(Vision(), torch.randn(5, 4)) == ["after gelu"] * 2


class TorchvisionMLP(nn.Sequential):
    """torchvision.ops.MLP and its use in torchvision.models: a subclass of nn.Sequential."""

    def __init__(self, widths, activation, inplace=None, dropout=0.0):
        options = {} if inplace is None else {"inplace": inplace}
        layers = []
        for width, following in pairwise(widths[:-1]):
            layers += [nn.Linear(width, following), activation(**options)]
            layers += [nn.Dropout(dropout, **options)]
        super().__init__(*layers, nn.Linear(*widths[-2:]), nn.Dropout(dropout, **options))


def test_torchvisions_mlp():
    model = TorchvisionMLP([4, 8, 8, 3], nn.SiLU)
    assert assert_unchanged(model, torch.randn(5, 4)) == ["after silu"] * 2
    model = TorchvisionMLP([4, 8, 8, 3], nn.ReLU, inplace=True)
    assert assert_unchanged(model, torch.randn(5, 4)) == []


def test_torchvisions_encoder_block():
    class EncoderBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln, self.mlp = nn.LayerNorm(4), TorchvisionMLP([4, 8, 4], nn.GELU)

        def forward(self, x):
            torch._assert(x.dim() == 3, f"expected (N, T, C), got {x.shape}")
            return x + self.mlp(self.ln(x))

    model = nn.Sequential(EncoderBlock(), EncoderBlock())
    assert assert_unchanged(model, torch.randn(2, 5, 4)) == ["after gelu"] * 2


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("BertForSequenceClassification", {"hidden_act": "gelu"}, ["after gelu"] * 2),
        ("BertForMaskedLM", {"hidden_act": "swish"}, ["after silu"] * 3),
        ("ViTForImageClassification", {"hidden_act": "swish"}, ["after silu"] * 2),
        ("LlamaForCausalLM", {"hidden_act": "swish"}, ["after silu"] * 2),
        ("GPT2LMHeadModel", {"activation_function": "gelu_new"}, ["after gelu_tanh"] * 2),
        ("GPT2LMHeadModel", {"activation_function": "gelu_fast"}, ["after gelu_tanh"] * 2),
        ("GPT2LMHeadModel", {"activation_function": "gelu_accurate"}, ["after gelu_tanh"] * 2),
    ],
)
def test_hugging_faces_models(kind, options, expected):
    model, given = hugging_face(kind, **options)
    before = copy.deepcopy(model)
    fuse_linear(model)
    logits = model(**given).logits
    assert fused(logits) == expected
    torch.testing.assert_close(logits, before(**given).logits)


def hugging_face(kind, **options):
    """A small model in evaluation mode, and inputs for it."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'fastmp[interop]'"
    )
    is_vit = kind.startswith("ViT")
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    if not is_vit:
        sizes = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    kinds = getattr(transformers, kind)
    model = kinds(kinds.config_class(**sizes, **WIDTHS, **options)).eval()
    given = torch.randn(2, 1, 8, 8) if is_vit else torch.randint(50, (2, 6))
    return model, {"pixel_values" if is_vit else "input_ids": given}


# ---- layers that keep z in place of their input act(z) ----


def small(module):
    return module, torch.randn(2, 5, 4)


def encoder_layer(activation, dropout=0.0):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, activation, batch_first=True)
    return small(layer)


RECOMPUTED = {
    "timm": (lambda: small(timm_mlp()), ["gelu"]),
    "timm, relu keeps y only": (lambda: small(timm_mlp(act_layer=nn.ReLU)), []),
    "timm, dropout": (lambda: small(timm_mlp(drop=0.1)), []),
    "timm, norm between": (lambda: small(timm_mlp(norm_layer=nn.LayerNorm)), []),
    "torchvision": (lambda: small(TorchvisionMLP([4, 8, 8, 3], nn.SiLU)), ["silu"] * 2),
    "torchvision, dropout": (lambda: small(TorchvisionMLP([4, 8, 3], nn.GELU, dropout=0.1)), []),
    "Sequential": (lambda: small(chain()), ["gelu"]),
    "torch": (lambda: encoder_layer(nn.functional.gelu), ["gelu"]),
    "torch, dropout": (lambda: encoder_layer(nn.functional.gelu, 0.1), []),
    "ViT": (lambda: hugging_face("ViTForImageClassification"), ["gelu"] * 2),
    "BERT": (lambda: hugging_face("BertForSequenceClassification"), ["gelu"] * 2),
    "GPT-2": (lambda: hugging_face("GPT2LMHeadModel"), ["gelu_tanh"] * 2),
    "Llama, gated": (lambda: hugging_face("LlamaForCausalLM"), []),
}


@pytest.mark.usefixtures("recomputing")
@pytest.mark.parametrize("name", RECOMPUTED)
def test_pairs_of_layers(name):
    make, expected = RECOMPUTED[name]
    model, given = make()
    results = []
    for each in (copy.deepcopy(model), fuse_linear(model)):
        torch.manual_seed(0)
        y = each(**given).logits if isinstance(given, dict) else each(given)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append((y.detach(), [p.grad for p in each.parameters()]))
    assert recomputed(y) == expected
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_hugging_faces_classes_there_and_back(name):
    """Subclasses of theirs, with their names, which pickle finds; and theirs again."""
    model, given = RECOMPUTED[name][0]()
    before = [(type(m), vars(m).keys()) for m in model.modules()]
    keys, expected = list(model.state_dict()), model(**given).logits
    fuse_linear(model)
    assert all(isinstance(m, kind) for m, (kind, _) in zip(model.modules(), before, strict=True))
    assert list(model.state_dict()) == keys
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(**given).logits, expected)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    unfuse_linear(model)
    assert [(type(m), vars(m).keys()) for m in model.modules()] == before
