"""Lightning: ``python examples/with_lightning.py``, or ``torchrun --nproc-per-node 2 examples/with_lightning.py``."""

import os
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from locoprop_torch import LocoProp


class Classifier(lightning.LightningModule):
    def __init__(self, data: TensorDataset) -> None:
        super().__init__()
        self.data = data
        self.net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def train_dataloader(self) -> DataLoader[Any]:
        size, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.data, size, rank, shuffle=False)
        return DataLoader(self.data, batch_size=64 // size, sampler=sampler)

    def configure_optimizers(self) -> Any:
        # The module that has the layers, which may be the LightningModule itself.
        opt = LocoProp(self, transfers={"net.2": "softmax"})
        return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1024, 20)
    y = x[:, :4].argmax(1)
    model = Classifier(TensorDataset(x, y))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        max_epochs=5,
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    trainer.fit(model)
    with torch.no_grad():
        final = nn.functional.cross_entropy(model.net(x), y)
    if trainer.is_global_zero:
        print(f"loss {final:.6f}")


if __name__ == "__main__":
    main()
