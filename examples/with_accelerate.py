"""Hugging Face accelerate: ``torchrun --nproc-per-node 2 examples/with_accelerate.py``, or ``accelerate launch``."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from locoprop_torch import LocoProp


def main() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(1024, 20)
    y = x[:, :4].argmax(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=64 // accelerator.num_processes)
    # Before or after the model is prepared.
    opt = LocoProp(model, transfers={"2": "softmax"})
    # A prepared scheduler makes a step for each process.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 40 * accelerator.num_processes)
    ddp, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
    for _ in range(5):
        for inputs, labels in loader:
            with accelerator.accumulate(ddp):
                loss = nn.functional.cross_entropy(ddp(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(ddp.parameters(), 1.0)
                opt.step()
                scheduler.step()
                opt.zero_grad()
    accelerator.save_state("state")
    with torch.no_grad():
        final = nn.functional.cross_entropy(model(x), y)
    accelerator.print(f"loss {final:.6f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
