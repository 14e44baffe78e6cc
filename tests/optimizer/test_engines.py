"""Engines that own the training loop: what they do is what a plain loop does, and they resume exactly."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from locoprop_torch import LocoProp
from tests.helpers import WithNorm, assert_same, batch


def loader(size=8):
    """Six batches of eight, in order."""
    return DataLoader(TensorDataset(*batch(48)), batch_size=size, shuffle=False)


def optimizer(model):
    return LocoProp(model, aux="adamw", rows=4)


def plain(epochs=4, accumulate=2):
    """The model after a loop as one writes it by hand: microbatches, clipping, a scheduler for each epoch."""
    model = WithNorm()
    opt = optimizer(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for _ in range(epochs):
        for number, (x, y) in enumerate(loader(), 1):
            (nn.functional.mse_loss(model(x), y) / accumulate).backward()
            if number % accumulate == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                opt.zero_grad()
        scheduler.step()
    return model


@pytest.fixture
def double():
    """Parameters that engines' models are made of in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


pytestmark = pytest.mark.usefixtures("double")


def test_lightning(tmp_path):
    lightning: Any = pytest.importorskip("lightning", reason="needs the extra [ecosystem]")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = WithNorm()

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.mse_loss(self.net(x), y)

        def configure_optimizers(self):
            opt = optimizer(self)
            return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]

    def trained(epochs, folder, checkpoint=None):
        module = Module()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, accumulate_grad_batches=2, gradient_clip_val=0.5,
            default_root_dir=tmp_path / folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader(), ckpt_path=checkpoint)
        return module.net, trainer

    whole, _ = trained(4, "whole")
    assert_same(whole, plain())
    _, trainer = trained(2, "half")
    path = trainer.checkpoint_callback.best_model_path
    assert path
    resumed, _ = trained(4, "rest", path)
    assert_same(resumed, whole, rtol=0, atol=0)


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra [ecosystem]")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)

    def trained(epochs, first=0, resume=None):
        model = WithNorm()
        opt = optimizer(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        model, opt, data = accelerator.prepare(model, opt, loader())
        accelerator.register_for_checkpointing(scheduler)
        if resume:
            accelerator.load_state(resume)
        for _ in range(first, epochs):
            for x, y in data:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.mse_loss(model(x), y))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    opt.step()
                    opt.zero_grad()
            scheduler.step()
        return model

    whole = trained(4)
    assert_same(whole, plain())
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    trained(2)
    accelerator.save_state(tmp_path / "state")
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    assert_same(trained(4, 2, tmp_path / "state"), whole, rtol=0, atol=0)


class Regression(nn.Module):
    """What the Trainer asks of a model."""

    def __init__(self):
        super().__init__()
        self.net = WithNorm()

    def forward(self, x, labels):
        outputs = self.net(x)
        return {"loss": nn.functional.mse_loss(outputs, labels), "logits": outputs}


def test_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra [ecosystem]")
    x, y = batch(48)
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def trained(epochs, folder, checkpoint=None):
        model = Regression()
        opt = optimizer(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), use_cpu=True, per_device_train_batch_size=8, gradient_accumulation_steps=2,
            max_grad_norm=0.5, num_train_epochs=epochs, save_strategy="epoch", train_sampling_strategy="sequential",
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        # Three steps an epoch.
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9 ** (step // 3))
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(opt, scheduler))
        trainer.train(resume_from_checkpoint=checkpoint)
        return model.net

    whole = trained(4, "whole")
    assert_same(whole, plain())
    resumed = trained(4, "rest", str(tmp_path / "whole" / "checkpoint-6"))
    assert_same(resumed, whole, rtol=0, atol=0)
