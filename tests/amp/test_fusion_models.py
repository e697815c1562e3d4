"""Which activations are fused in models that people use; none of them changes a value."""

import copy
import importlib
import importlib.util
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from fastmp.amp.fusion import fuse_linear
from tests.amp.fusion_cases import assert_unchanged, fused

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
        # "gelu" and "silu" of Hugging Face are classes of its own, and GPT-2 has no nn.Linear
        ("BertForSequenceClassification", {"hidden_act": "gelu"}, []),
        ("BertForMaskedLM", {"hidden_act": "swish"}, ["after silu"] * 3),
        ("ViTForImageClassification", {"hidden_act": "swish"}, ["after silu"] * 2),
        ("LlamaForCausalLM", {"hidden_act": "swish"}, ["after silu"] * 2),
        ("GPT2LMHeadModel", {"activation_function": "swish"}, []),
    ],
)
def test_hugging_faces_models(kind, options, expected):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'fastmp[interop]'"
    )
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    if not kind.startswith("ViT"):
        sizes = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    kinds = getattr(transformers, kind)
    model = kinds(kinds.config_class(**sizes, **WIDTHS, **options)).eval()
    before = copy.deepcopy(model)
    fuse_linear(model)
    given = torch.randn(2, 1, 8, 8) if kind.startswith("ViT") else torch.randint(50, (2, 6))
    logits = model(given).logits
    assert fused(logits) == expected
    torch.testing.assert_close(logits, before(given).logits)
