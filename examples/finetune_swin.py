"""Fine-tunes a small Swin at larger images and a larger window than its checkpoint's, on handwritten digits.

    python -m examples.finetune_swin

1. Trains on 16x16 images with windows of 4 and saves the weights.
2. Loads them into a model with windows of 6: the bias tables are resized from 7x7 to 11x11 entries.
3. Fine-tunes on 24x24 images.

Writes out/finetune_swin.png, the bias tables before and after, and prints the accuracy at each step on validation digits, by
which the settings were chosen, and on held-out digits, by which nothing was. About a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
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
HELD_OUT = VALIDATION = 240
RATE = 4e-3  # the learning rate of training and of fine-tuning, each the best of several on the validation digits
BATCH = 64


class Digits(NamedTuple):
    """Images [N, 1, 8, 8] with mean 0 and deviation 1, and their labels [N]."""

    images: Tensor
    labels: Tensor


def digits() -> tuple[Digits, Digits, Digits]:
    """scikit-learn's 1797 digits: 1317 to train on, and stratified splits for validation and to hold out, the same always."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None]
    images, labels = (images - images.mean()) / images.std(), torch.from_numpy(data.target)
    rest, held_out = train_test_split(range(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=VALIDATION, stratify=labels[rest], random_state=0)
    return tuple(Digits(images[part], labels[part]) for part in (train, validation, held_out))


def at_size(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)


def train(model: nn.Module, data: Digits, side: int, epochs: int, learning_rate: float, title: str) -> None:
    """Trains in place, AdamW under a one-cycle schedule; bias tables are exempt from weight decay."""
    exempt = model.no_weight_decay()
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in exempt], "weight_decay": 0.05},
        {"params": [p for name, p in model.named_parameters() if name in exempt], "weight_decay": 0.0},
    ]
    images, labels = at_size(data.images, side), data.labels
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
def accuracy(model: nn.Module, data: Digits, side: int) -> float:
    model.eval()
    images, labels = at_size(data.images, side), data.labels
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
    train_digits, *tests = digits()

    def report(what: str, model: nn.Module, side: int) -> None:
        print(f"{what:34}{'   '.join(f'{accuracy(model, data, side):6.1%}' for data in tests)}")

    print(f"{'':34}validation   held-out")
    model = create_model("swin_tiny_patch4_window7_224", window_size=4, **MODEL)
    train(model, train_digits, 16, options.epochs, RATE, "train, window 4")
    report("16x16, windows of 4", model, 16)
    checkpoint = options.out / "swin_window4.pth"
    torch.save(model.state_dict(), checkpoint)
    trained = first_tables(model)

    model = create_model("swin_tiny_patch4_window7_224", window_size=6, pretrained=checkpoint, **MODEL)
    resized = first_tables(model)
    report("24x24, windows of 6, as loaded", model, 24)
    train(model, train_digits, 24, options.tune_epochs, RATE, "fine-tune, window 6")
    report("24x24, windows of 6, fine-tuned", model, 24)

    picture = options.out / "finetune_swin.png"
    draw({"window 4, trained": trained, "window 6, resized": resized, "window 6, fine-tuned": first_tables(model)}, picture)
    print(f"{picture}: bias tables of the first shifted block ({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()
