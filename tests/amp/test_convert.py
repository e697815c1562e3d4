"""What becomes 16-bit, what stays fp32 because a cast would change what it says."""

import copy

import pytest
import torch
from torch import nn

import fastmp

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convert_keeps_batch_norms_in_fp32_and_every_key(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    keys = list(model.state_dict())
    weight = model[0].weight
    assert fastmp.convert(model, dtype) is model
    assert list(model.state_dict()) == keys
    assert model[0].weight is weight
    kinds = {k: v.dtype for k, v in model.state_dict().items()}
    assert kinds.pop("1.num_batches_tracked") == torch.int64
    assert {k for k, d in kinds.items() if d == torch.float32} == {
        f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }
    assert all(d in (dtype, torch.float32) for d in kinds.values())
    out = model(torch.randn(8, 1, 8, 8).to(dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert model[0].weight.grad.dtype == dtype
    assert model[1].weight.grad.dtype == torch.float32
    assert model.eval()(torch.randn(8, 1, 8, 8).to(dtype)).isfinite().all()


def test_convert_goes_back_and_loads_old_checkpoints():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    saved = copy.deepcopy(model.state_dict())
    fastmp.convert(model, torch.bfloat16)
    model.load_state_dict(saved)
    assert torch.equal(model[0].weight, saved["0.weight"].bfloat16())
    fastmp.convert(model, torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_convert_refuses_what_it_cannot_convert():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        fastmp.convert(3)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        fastmp.convert(model, torch.float64)
    assert model.weight.dtype == torch.float32


class Counted(nn.Module):
    """A step counter in every form, a linear layer, and a table that is added to its input."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("positions", torch.arange(3000.0))
        self.register_buffer("table", torch.linspace(0, 1, 4).sin()[None])
        self.register_buffer("offset", torch.linspace(0, 1, 8).view(2, 4), persistent=False)
        self.register_buffer("mask", torch.tensor([[0.0, -torch.inf]]))

    def forward(self, x):
        self.steps += 1
        self.seen += 1
        return self.fc(x + self.table + self.offset[0]) * self.steps


@pytest.mark.parametrize("dtype", HALVES)
def test_counters_count(dtype):
    model = fastmp.convert(Counted(), dtype)
    for _ in range(3000):
        model.steps += 1
        model.seen += 1
    assert (int(model.steps), int(model.seen)) == (3000, 3000)
    assert torch.equal(model.positions, torch.arange(3000.0))
    cast = {n for n, b in model.named_buffers() if b.dtype == dtype}
    assert cast == {"table", "offset", "mask"}
    assert model(torch.randn(2, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_running_statistics_of_instance_norms(dtype, dims, affine):
    torch.manual_seed(0)
    kind = getattr(nn, f"InstanceNorm{dims}d")
    plain = kind(3, affine=affine, track_running_stats=True)
    model = fastmp.convert(nn.Sequential(copy.deepcopy(plain)), dtype)
    for _ in range(200):
        x = (torch.randn(4, 3, *[5] * dims) + 3).to(dtype)
        assert model(x).dtype == dtype
        plain(x.float())
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model[0].get_buffer(name), buffer, rtol=1e-3, atol=1e-4)
    assert model.eval()(x).dtype == dtype
    assert type(fastmp.convert(model, torch.float32)[0]) is kind


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_spectral_norm_of_one_row(norm, dtype):
    """The last layer of a discriminator: its vector of one element is 1, and no counter."""
    torch.manual_seed(0)
    plain = norm(nn.Linear(8, 1))
    model = fastmp.convert(copy.deepcopy(plain), dtype)
    x = torch.randn(4, 8).to(dtype)
    assert model(x).dtype == dtype
    torch.testing.assert_close(model(x).float(), plain(x.float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "Qwen2"])
@pytest.mark.parametrize("dtype", HALVES)
def test_rotary_tables_are_those_of_from_pretrained(kind, dtype, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'fastmp[interop]'"
    )
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 4096,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    plain = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    plain.save_pretrained(tmp_path)
    theirs = type(plain).from_pretrained(tmp_path, dtype=dtype).eval()
    ours = fastmp.convert(copy.deepcopy(plain), dtype)
    tables = {n: b for n, b in theirs.named_buffers() if "freq" in n}
    assert tables
    for name, table in tables.items():
        assert table.dtype == torch.float32
        assert torch.equal(ours.get_buffer(name), table)
    tokens = torch.randint(50, (1, 6))
    assert ours(tokens).logits.dtype == dtype
    rotary = next(m for n, m in ours.named_modules() if n.endswith("rotary_emb"))
    exact = next(m for n, m in plain.named_modules() if n.endswith("rotary_emb"))
    positions = torch.tensor([[3000]])
    cosine = rotary(torch.zeros(1, 1, 32, dtype=dtype), positions)[0]
    assert (cosine - exact(torch.zeros(1, 1, 32), positions)[0]).abs().max() < 0.01


TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
HEADS = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("T5ForConditionalGeneration", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}),
        (
            "DeepseekV3ForCausalLM",
            {**EXPERTS, **HEADS, "moe_intermediate_size": 16, "q_lora_rank": 8,
             "num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 1},
        ),
    ],
)  # fmt: skip
def test_what_a_model_of_transformers_keeps_in_fp32(kind, sizes, dtype, tmp_path):
    """T5's wo overflows in fp16; the bias of a router moves by 0.001, which bf16 does not add."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'fastmp[interop]'"
    )
    model_class = getattr(transformers, kind)
    plain = model_class(model_class.config_class(**TINY, **sizes)).eval()
    plain.save_pretrained(tmp_path)
    theirs = model_class.from_pretrained(tmp_path, dtype=dtype).eval()
    ours = fastmp.convert(copy.deepcopy(plain), dtype)
    a, b = ({n: t.dtype for n, t in m.state_dict().items()} for m in (ours, theirs))
    assert a == b
    assert (torch.float32 in b.values()) == (kind[:2] != "T5" or dtype == torch.float16)
    tokens = torch.randint(50, (1, 6))
    given = {"decoder_input_ids": tokens} if kind[:2] == "T5" else {}
    torch.testing.assert_close(ours(tokens, **given).logits, theirs(tokens, **given).logits)


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("1", {"1.weight", "1.bias"}),
        ("*.bias", {"0.bias", "1.bias"}),
        (nn.LayerNorm, {"1.weight", "1.bias"}),
    ],
)
def test_a_caller_names_exceptions(entry, kept):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    for keep in (entry, [entry]):
        fastmp.convert(model, torch.bfloat16, keep_fp32=keep)
        assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == kept
    fastmp.convert(model, torch.bfloat16)
    assert not any(p.dtype == torch.float32 for p in model.parameters())


def test_an_exception_that_fits_nothing():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"keep_fp32 has 'head', which fits no tensor"):
        fastmp.convert(model, torch.bfloat16, keep_fp32=["weight", "head"])
    assert model.weight.dtype == torch.float32
