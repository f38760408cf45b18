"""Train a small classifier of digit images with PyTorch Lightning, recorded by one line.

pip install 'stepspan[lightning,demo]'
OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 python examples/lightning_classifier.py
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from stepspan.integrations.lightning import StepspanCallback


class Classifier(LightningModule):
    """64 pixels to 10 classes."""

    def __init__(self, hidden: int = 32, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Cross-entropy of a batch."""
        pixels, labels = batch
        loss = nn.functional.cross_entropy(self.layers(pixels), labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        """Cross-entropy and accuracy of a batch."""
        pixels, labels = batch
        scores = self.layers(pixels)
        self.log("val_loss", nn.functional.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"], momentum=0.9)


def main() -> None:
    """Three epochs, with gradients accumulated over two batches."""
    seed_everything(7, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target))
    held_out, training = random_split(data, [297, 1500])
    trainer = Trainer(
        max_epochs=3,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(dirpath="checkpoints"), StepspanCallback(name="digits")],
    )
    loaders = (DataLoader(training, batch_size=50, shuffle=True), DataLoader(held_out, batch_size=100))
    trainer.fit(Classifier(), *loaders)
    print(f"accuracy {trainer.callback_metrics['val_accuracy']:.1%}")


if __name__ == "__main__":
    main()
