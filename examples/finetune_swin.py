"""Fine-tunes a small Swin at larger images and a larger window than its checkpoint's, on handwritten digits.

    python -m examples.finetune_swin

1. Trains on 16x16 images with windows of 4 and saves the weights.
2. Loads them into a model with windows of 6: the bias tables are resized from 7x7 to 11x11 entries.
3. Fine-tunes on 24x24 images.

Writes out/finetune_swin.png, the bias tables before and after, and prints the accuracy on held-out digits at each step. About
a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from natrpb import rpb
from natrpb.models import create_model

MODEL = dict(
    embed_dim=32,
    depths=(2, 2),
    num_heads=(2, 4),
    patch_size=2,
    in_chans=1,
    num_classes=10,
    drop_path_rate=0.0,
)
HELD_OUT = 360
BATCH = 64


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits, shuffled: images [N, 1, 8, 8] with mean 0 and deviation 1, labels [N]."""
    data = load_digits()
    order = torch.randperm(len(data.target))
    images = torch.from_numpy(data.images).float()[order, None]
    return (images - images.mean()) / images.std(), torch.from_numpy(data.target)[order]


def at_size(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, learning_rate: float, title: str) -> None:
    """Trains in place, AdamW under a one-cycle schedule; bias tables are exempt from weight decay."""
    exempt = model.no_weight_decay()
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in exempt], "weight_decay": 0.05},
        {"params": [p for name, p in model.named_parameters() if name in exempt], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc=title, unit="step") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(BATCH), labels.split(BATCH)))
    return right / len(labels)


def first_tables(model: nn.Module) -> Tensor:
    """Bias tables of the second block, whose windows are shifted: [heads, 2 W - 1, 2 W - 1], by key minus query."""
    attention = model.layers[0].blocks[1].attn
    return rpb.swin_to_nat(attention.relative_position_bias_table.detach(), attention.window_size).clone()


def draw(columns: dict[str, Tensor], path: Path) -> None:
    """One row per head, one column per title; all on one color scale."""
    heads = len(next(iter(columns.values())))
    reach = max(table.abs().max().item() for table in columns.values())
    figure, panels = plt.subplots(heads, len(columns), figsize=(3.2 * len(columns), 2.9 * heads), layout="constrained")
    for column, (title, tables) in enumerate(columns.items()):
        half = tables.shape[-1] // 2
        for head, table in enumerate(tables):
            panel = panels[head, column]
            edges = (-half - 0.5, half + 0.5, half + 0.5, -half - 0.5)
            picture = panel.imshow(table, cmap="RdBu_r", vmin=-reach, vmax=reach, extent=edges)
            panel.set_title(title if head == 0 else "")
            panel.locator_params(integer=True)
            panel.set_ylabel(f"head {head}\nrows from the query" if column == 0 else "")
            panel.set_xlabel("columns from the query" if head == heads - 1 else "")
    figure.colorbar(picture, ax=panels, label="bias added to the score")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a small Swin at another window size than its checkpoint's.")
    parser.add_argument("--epochs", type=int, default=24, help="of training at 16x16 with windows of 4")
    parser.add_argument("--tune-epochs", type=int, default=10, help="of fine-tuning at 24x24 with windows of 6")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the weights and the picture go")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    start = time.perf_counter()
    images, labels = digits()
    small, large = at_size(images, 16), at_size(images, 24)
    train_labels, test_labels = labels[HELD_OUT:], labels[:HELD_OUT]

    model = create_model("swin_tiny_patch4_window7_224", window_size=4, **MODEL)
    train(model, small[HELD_OUT:], train_labels, options.epochs, 4e-3, "train, window 4")
    print(f"16x16, windows of 4:                {accuracy(model, small[:HELD_OUT], test_labels):.1%} of held-out digits")
    checkpoint = options.out / "swin_window4.pth"
    torch.save(model.state_dict(), checkpoint)
    trained = first_tables(model)

    model = create_model("swin_tiny_patch4_window7_224", window_size=6, pretrained=checkpoint, **MODEL)
    resized = first_tables(model)
    print(f"24x24, windows of 6, as loaded:     {accuracy(model, large[:HELD_OUT], test_labels):.1%}")
    train(model, large[HELD_OUT:], train_labels, options.tune_epochs, 2e-3, "fine-tune, window 6")
    print(f"24x24, windows of 6, fine-tuned:    {accuracy(model, large[:HELD_OUT], test_labels):.1%}")

    picture = options.out / "finetune_swin.png"
    draw({"window 4, trained": trained, "window 6, resized": resized, "window 6, fine-tuned": first_tables(model)}, picture)
    print(f"{picture}: bias tables of the first shifted block ({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()
