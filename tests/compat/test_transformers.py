"""Hugging Face transformers: its Trainer with our model, optimizer and loss."""

import pytest
import torch
from torch import nn

import fastmp
from fastmp.functional import linear_cross_entropy
from fastmp.optim import state_kinds
from tests.compat.conftest import (
    CLASSES,
    FEATURES,
    Classifier,
    accuracy,
    assert_learnt_over_overflows,
)

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'fastmp[interop]'"
)


class Labelled(nn.Module):
    """The interface of its Trainer: named inputs, loss and logits as output."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.criterion = fastmp.nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, points=None, labels=None):
        logits = self.model(points)
        return {"loss": self.criterion(logits, labels), "logits": logits}


def rows(points):
    return [{"points": x, "labels": y} for x, y in points]


def arguments(folder, **more):
    return transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=6, per_device_train_batch_size=24,
        gradient_accumulation_steps=2, max_grad_norm=0.5, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_strategy="no", **more,
    )  # fmt: skip


def test_the_trainer_with_accumulation_and_clipping(model, optimizer, points, tmp_path):
    schedule = fastmp.optim.lr_scheduler.LRScheduler(optimizer, fastmp.schedule.OneCycle(0.01, 30))
    trainer = transformers.Trainer(
        Labelled(model), arguments(tmp_path, save_strategy="no"), train_dataset=rows(points),
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    assert int(optimizer.applied_steps) == 30
    assert float(optimizer.grad_norm) <= 0.5 * 1.01
    assert accuracy(model, points) > 0.95


@pytest.mark.parametrize("dtype", [torch.float16])
def test_fp16_with_our_scaler(model, optimizer, points, scaler, tmp_path):
    given = arguments(tmp_path, save_strategy="no")
    given.max_grad_norm = 0.0  # the optimizer clips
    plan = fastmp.schedule.OneCycle(0.01, 30)
    schedule = fastmp.optim.lr_scheduler.LRScheduler(optimizer, plan)
    trainer = transformers.Trainer(
        Labelled(model), given, train_dataset=rows(points), optimizers=(optimizer, schedule)
    )
    trainer.accelerator.scaler = scaler  # it makes one on a GPU, in mixed precision
    trainer.train()
    assert_learnt_over_overflows(model, optimizer, points)
    assert schedule.get_last_lr() == [plan(int(optimizer.applied_steps))[0]]


@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "8bit", "ema": 0.9, "master": "split"}], ids=["fp32", "8bit"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_run_is_resumed_to_the_bit(dtype, points, tmp_path, monkeypatch, options):
    """Its checkpoints hold our masters and moments, and the loss scale, which fell at once."""
    monkeypatch.setattr(state_kinds, "MIN_8BIT_NUMEL", 64)

    def trained(folder, resume):
        torch.manual_seed(0)
        model = fastmp.convert(Classifier(), dtype)
        params = model.parameters()
        optimizer = fastmp.optim.AdamW(params, lr=0.01, max_grad_norm=0.5, **options)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        given = arguments(folder, save_strategy="steps", save_steps=10, seed=1)
        given.max_grad_norm = 0.0
        trainer = transformers.Trainer(
            Labelled(model), given, train_dataset=rows(points), optimizers=(optimizer, schedule)
        )
        if dtype == torch.float16:
            trainer.accelerator.scaler = fastmp.amp.GradScaler("cpu", init_scale=2.0**24)
        trainer.train(resume_from_checkpoint=resume)
        averages = optimizer.averages() if options else []
        return [*optimizer.masters(), *averages, optimizer.skipped_steps]

    whole = trained(tmp_path / "run", None)
    again = trained(tmp_path / "again", str(tmp_path / "run" / "checkpoint-10"))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_model_of_theirs_is_converted():
    """A small BERT: converted, fused where that is certain, trained to fit one batch."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=CLASSES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    keys = list(model.state_dict())
    fastmp.convert(model, torch.bfloat16)
    assert list(model.state_dict()) == keys
    assert any(isinstance(m, fastmp.nn.Linear) for m in model.modules())
    optimizer = fastmp.optim.AdamW(model.named_parameters(), lr=3e-3, max_grad_norm=1.0)
    words = torch.randint(50, (16, FEATURES))
    labels = torch.arange(16) % CLASSES
    for _ in range(40):
        optimizer.zero_grad()
        loss = fastmp.functional.cross_entropy(model(words).logits, labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


class WithoutLogits(nn.Module):
    """That of docs/migrating.md."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, **inputs):
        hidden = self.model.base_model(input_ids, **inputs).last_hidden_state
        rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {"loss": linear_cross_entropy(rows, self.model.lm_head.weight, targets)}


def causal_language_model(kind):
    sizes = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    if kind == "gpt2":
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off))
    config = transformers.LlamaConfig(**sizes, intermediate_size=64)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_causal_language_model_without_logits(kind):
    """The model's own loss and gradients; GPT-2's head is its embedding."""
    torch.manual_seed(0)
    model = causal_language_model(kind)
    tokens = torch.randint(97, (3, 12))
    labels = tokens.clone()
    labels[:, :4] = -100
    mask = torch.ones_like(tokens)
    expected = model(tokens, attention_mask=mask, labels=labels).loss
    grads = torch.autograd.grad(expected, list(model.parameters()))
    loss = WithoutLogits(model)(tokens, labels, attention_mask=mask)["loss"]
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, list(model.parameters())), grads, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
