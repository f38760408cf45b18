"""Train a tiny transformer from scratch with the Hugging Face Trainer, recorded by one line. Nothing is downloaded.

It learns whether a certain word stands in a sentence.

    pip install 'stepspan[huggingface]'
    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 python examples/huggingface_trainer.py
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from stepspan.integrations.huggingface import StepspanCallback

WORDS, LENGTH = 12, 8


class Sentences(Dataset):
    """Random sentences, and whether word 1 is in them."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(1, WORDS, (count, LENGTH), generator=generator)
        self.labels = (self.words == 1).any(1).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def main() -> None:
    """Two epochs, with gradients accumulated over two batches."""
    set_seed(7)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir="checkpoints",
        num_train_epochs=2,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=5,
        eval_strategy="epoch",
        save_strategy="epoch",
        include_num_input_tokens_seen=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=arguments,
        train_dataset=Sentences(1280, seed=1),
        eval_dataset=Sentences(160, seed=2),
        callbacks=[StepspanCallback(name="find a word")],
    )
    trainer.train()
    print(f"loss {trainer.state.log_history[-2]['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
