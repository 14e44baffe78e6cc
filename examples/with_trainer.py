"""The Trainer of transformers: ``torchrun --nproc-per-node 2 examples/with_trainer.py``."""

import os

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from locoprop_torch import LocoProp


class Counting(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences that count in steps of one to three."""

    def __init__(self, count: int, length: int) -> None:
        starts, steps = torch.randint(32, (count, 1)), torch.randint(1, 4, (count, 1))
        self.tokens = (starts + steps * torch.arange(length)) % 32

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    # The embedding and the normalisations go to aux.
    opt = LocoProp(model, transfers={"lm_head": "softmax"}, aux="adamw")
    arguments = TrainingArguments(
        "trainer",
        use_cpu=True,
        per_device_train_batch_size=16 // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=2,
        max_steps=20,
        save_steps=10,
        logging_steps=5,
        report_to=[],
        disable_tqdm=True,
    )
    scheduler = get_cosine_schedule_with_warmup(opt, num_warmup_steps=2, num_training_steps=20)
    trainer = Trainer(model, arguments, train_dataset=Counting(1024, 16), optimizers=(opt, scheduler))
    trainer.train()
    if trainer.is_world_process_zero():
        tokens = Counting(64, 16).tokens
        with torch.no_grad():
            final = model(input_ids=tokens, labels=tokens).loss
        print(f"loss {final:.6f}")


if __name__ == "__main__":
    main()
