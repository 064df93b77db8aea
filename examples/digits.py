"""The demo: trains a small NAT on handwritten digits, times the op, and draws what was learned.

    python -m examples.digits [--epochs N] [--seed N] [--out FOLDER] [--quick]

1. A NAT of one stage learns scikit-learn's 1797 digits of 8x8 pixels. A border of one pixel is added and every pixel blown up
   to 4x4, so that the stem (stride 4) makes one token per pixel: a map of 10x10, of which a query sees 5x5. Behind the stem
   only the bias tables tell where a key stands; what they are worth shows when they are zeroed in the trained model, and in
   a second model that is trained without them.
2. The compiled op against the plain-PyTorch reference, at the first stage of a NAT on 224x224 images.
3. A NAT learns to remove noise from scikit-learn's two photographs (a teacher that needs no labels): a pixel is best restored
   from others like it, so its attention has to find them.

One seed always gives the same numbers on one machine with one number of threads.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natrpb
from natrpb import explain, reference
from natrpb.models import NAT
from natrpb.patterns import neighborhood_pattern

try:
    from matplotlib.figure import Figure
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits, load_sample_image
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as error:
    sys.exit(
        f"The demo needs matplotlib, safetensors, scikit-learn and tqdm ({error}): "
        "run it by `make demo`, or install requirements/demo.txt."
    )

DIGITS_NAT = dict(
    embed_dim=48, depths=(3,), num_heads=(3,), mlp_ratio=2, kernel_size=5, in_chans=1, num_classes=10, drop_path_rate=0.0
)
PHOTO_NAT = dict(embed_dim=48, depths=(2,), num_heads=(3,), mlp_ratio=2, kernel_size=13, drop_path_rate=0.0, features_only=True)
PHOTO_QUERIES = [(0, 0), (30, 0), (22, 36), (17, 64), (40, 40)]  # (row, column) of tokens of china.jpg: corner, edge, inside
RATE = 2e-3  # learning rate; the tables' is a multiple of it: they start near 0.02 and are to reach values of 1 and more
PATIENCE = 75  # seconds of training after which the second model is left out
NOISE = 0.3


class Digits(NamedTuple):
    """A stratified quarter is held out, the same one for every seed."""

    images: Tensor  # [1347, 1, 40, 40] in 0 to 4
    labels: Tensor  # int64 [1347]
    held_out_images: Tensor  # [450, 1, 40, 40]
    held_out_labels: Tensor  # int64 [450]


def read_digits() -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 4
    images = F.interpolate(F.pad(images, (1, 1, 1, 1)), scale_factor=4, mode="bilinear")
    split = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    train, held_out = (torch.tensor(part) for part in split)
    labels = torch.tensor(labels)
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def jitter(images: Tensor) -> Tensor:
    """Turns every image by up to 7 degrees, scales it by up to 7% and shifts it by up to 7% of its side."""
    angle, zoom, *shift = (0.14 * torch.rand(4, len(images)) - 0.07) * torch.tensor([1.75, 1, 2, 2])[:, None]
    cosine, sine = angle.cos() * (1 + zoom), angle.sin() * (1 + zoom)
    matrices = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def widen(model: nn.Module) -> nn.Module:
    """Redraws linear layers with deviation 1 / sqrt(inputs): NAT's own 0.02 suits its hundreds of channels, not 48."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def fit(network: nn.Module, losses: Iterator[Tensor], steps: int, title: str, table_rate: float) -> float:
    """Takes `steps` losses and an optimizer step for each, the tables' with `table_rate` times RATE; returns the seconds."""
    named = list(network.named_parameters())
    tables = [parameter for name, parameter in named if name.endswith("rpb")]
    matrices = [parameter for name, parameter in named if parameter.dim() > 1 and not name.endswith("rpb")]
    vectors = [parameter for name, parameter in named if parameter.dim() == 1]
    groups = [
        {"params": matrices, "lr": RATE, "weight_decay": 0.05},
        {"params": vectors, "lr": RATE, "weight_decay": 0.0},
        {"params": tables, "lr": table_rate * RATE, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.1
    )
    network.train()
    recent = None
    start = time.perf_counter()
    with tqdm(total=steps, desc=title, unit="step", mininterval=0.5, dynamic_ncols=True) as bar:
        for _, loss in zip(range(steps), losses):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            recent = loss.item() if recent is None else 0.95 * recent + 0.05 * loss.item()
            bar.set_postfix_str(f"loss {recent:.3f}", refresh=False)
            bar.update()
    network.eval()
    return time.perf_counter() - start


def train_on_digits(digits: Digits, epochs: int, seed: int, rel_pos_bias: bool = True) -> tuple[NAT, float]:
    """Returns the trained model and the seconds of training."""
    torch.manual_seed(seed)
    model = widen(NAT(**DIGITS_NAT, rel_pos_bias=rel_pos_bias))
    batch_size = 32

    def losses() -> Iterator[Tensor]:
        while True:
            for batch in torch.randperm(len(digits.images)).split(batch_size):
                logits = model(jitter(digits.images[batch]))
                yield F.cross_entropy(logits, digits.labels[batch], label_smoothing=0.1)

    steps = epochs * math.ceil(len(digits.images) / batch_size)
    title = "NAT with RPB" if rel_pos_bias else "NAT without RPB"
    return model, fit(model, losses(), steps, title, table_rate=20)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the held-out digits that the model gets right."""
    return (model(digits.held_out_images).argmax(1) == digits.held_out_labels).float().mean().item()


def without_bias(model: NAT) -> NAT:
    """A copy whose bias tables are zero: every key of a neighborhood counts alike, wherever it stands."""
    copied = copy.deepcopy(model)
    for name in copied.no_weight_decay():
        nn.init.zeros_(copied.get_parameter(name))
    return copied


def digits_part(epochs: int, seed: int, out: Path) -> list[Path]:
    digits = read_digits()
    print(f"\n1. Handwritten digits: {len(digits.labels)} to learn from, {len(digits.held_out_labels)} held out")
    model, seconds = train_on_digits(digits, epochs, seed)
    reached = accuracy(model, digits)
    print(f"   held-out accuracy                                     {reached:7.2%}   (trained in {seconds:.0f} s)")
    print(f"   the same model with RPB switched off (tables zeroed)  {accuracy(without_bias(model), digits):7.2%}")
    if seconds < PATIENCE:
        plain, seconds = train_on_digits(digits, epochs, seed, rel_pos_bias=False)
        print(f"   a model trained without RPB from the start            {accuracy(plain, digits):7.2%}   ({seconds:.0f} s)")
    else:
        print(f"   training took over {PATIENCE} s: no second model without RPB, to compare, on this machine")

    weights, picture = out / "digits_nat.safetensors", out / "bias_tables.png"
    save_file(model.state_dict(), weights, metadata={"natrpb.models.NAT": json.dumps(DIGITS_NAT)})
    blocks = model.levels[0].blocks
    tables = {f"block {number}": block.attn.rpb for number, block in enumerate(blocks)}
    explain.bias_table_figure(tables).savefig(picture, dpi=110)
    return [weights, picture]


def timed(run: Callable, forward: Callable, repeats: int) -> tuple[float, float]:
    """Median and minimum of the milliseconds that `run(forward)` takes."""
    run(forward)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(forward)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), min(times)


def speed_part(repeats: int) -> None:
    info = natrpb.info()
    print("\n2. Speed of neighborhood attention with RPB: [1, 56, 56, 2 heads, 32], kernel size 7, fp32")
    if not info["compiled"]:
        print(f"   nothing to compare: natrpb itself runs on the reference here ({info['reason']})")
        return
    torch.manual_seed(0)
    inputs = [tensor.requires_grad_() for tensor in torch.randn(3, 1, 56, 56, 2, 32).unbind(0)]
    inputs.append(torch.randn(2, 13, 13).requires_grad_())
    upstream = torch.randn(1, 56, 56, 2, 32)
    pattern = neighborhood_pattern(2, 7)

    def ours() -> Tensor:
        query, key, value, rpb = inputs
        return natrpb.na2d(query, key, value, kernel_size=7, rpb=rpb)

    def plain() -> Tensor:
        return reference.local_attention(*inputs, pattern, 32**-0.5)[0]

    def step(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = forward()
        return out, *torch.autograd.grad(out, inputs, upstream)

    for ours_result, plain_result in zip(step(ours), step(plain)):
        torch.testing.assert_close(ours_result, plain_result, rtol=1e-3, atol=1e-3)
    print(f"   results and gradients are equal; {info['threads']} threads, {info['isa']}; median (fastest) of the runs")
    print("                        natrpb                plain PyTorch")
    for name, run in (("forward", torch.no_grad()(lambda forward: forward())), ("training step", step)):
        median, fastest = timed(run, ours, 10 * repeats)
        plain_median, plain_fastest = timed(run, plain, repeats)
        print(
            f"   {name:14s}  {median:8.2f} ms ({fastest:.2f})   {plain_median:8.1f} ms ({plain_fastest:.1f})"
            f"   {plain_median / median:.0f} times faster"
        )


class Denoiser(nn.Module):
    """A NAT's map and a linear layer that turns each token into its 4x4 pixels; [B, 3, H, W] -> [B, 3, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = widen(NAT(**PHOTO_NAT))
        self.to_pixels = nn.Conv2d(PHOTO_NAT["embed_dim"], 3 * 4 * 4, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.to_pixels(self.backbone(4 * (x - 0.5))[0]), 4)


def read_photograph(name: str) -> Tensor:
    """One of scikit-learn's photographs at half its size, [3, 212, 320] in 0 to 1."""
    image = torch.tensor(load_sample_image(name)).permute(2, 0, 1) / 255
    return F.avg_pool2d(image[:, :424], 2)


def random_crops(photographs: Tensor, count: int, side: int) -> Tensor:
    """photographs [P, 3, H, W] -> [count, 3, side, side], half of them mirrored."""
    height, width = photographs.shape[-2:]
    crops = []
    for _ in range(count):
        which, top, left = (int(torch.randint(end, ())) for end in (len(photographs), height - side, width - side))
        crop = photographs[which, :, top : top + side, left : left + side]
        crops.append(crop.flip(-1) if torch.rand(()) < 0.5 else crop)
    return torch.stack(crops)


def decibels(restored: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio."""
    return -10 * math.log10((restored - clean).square().mean().item())


def photograph_part(steps: int, seed: int, out: Path) -> list[Path]:
    print("\n3. Photographs: a NAT learns to remove noise, so that its attention has something to look for")
    torch.manual_seed(seed)
    photographs = torch.stack([read_photograph(name) for name in ("china.jpg", "flower.jpg")])
    model = Denoiser()

    def losses() -> Iterator[Tensor]:
        while True:
            clean = random_crops(photographs, count=8, side=96)
            yield F.mse_loss(model(clean + NOISE * torch.randn_like(clean)), clean)

    seconds = fit(model, losses(), steps, "NAT on photographs", table_rate=10)
    clean = photographs[:1]
    noisy = clean + NOISE * torch.randn_like(clean)
    with torch.no_grad():
        restored = model(noisy)
    before, after = decibels(noisy, clean), decibels(restored, clean)
    print(f"   china.jpg: {before:.1f} dB with noise, {after:.1f} dB restored   (trained in {seconds:.0f} s)")

    pictures = [out / "attention.png", out / "denoised.png"]
    last = "backbone.levels.0.blocks.1.attn"
    attention, inputs = model.get_submodule(last), explain.attention_inputs(model, noisy)[last]
    weights = torch.cat([explain.attention_weights(attention, inputs, query) for query in PHOTO_QUERIES])
    explain.attention_figure(
        clean[0].permute(1, 2, 0),
        weights,
        PHOTO_QUERIES,
        neighborhood_pattern(2, PHOTO_NAT["kernel_size"]),
        "Where the last block of a NAT, trained to remove noise, looks:\n"
        "for pixels like the query's. At the border the window stops and keeps its size.",
    ).savefig(pictures[0], dpi=110)

    figure = Figure(figsize=(11, 2.75), layout="constrained")
    panels = {f"with noise, {before:.1f} dB": noisy, f"restored, {after:.1f} dB": restored, "the photograph": clean}
    for panel, (title, image) in zip(figure.subplots(1, 3), panels.items()):
        panel.imshow(image[0].permute(1, 2, 0).clamp(0, 1).numpy())
        panel.set_title(title, fontsize=10)
        panel.set_axis_off()
    figure.savefig(pictures[1], dpi=110)
    return pictures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=28, help="passes over the digits (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {arguments.epochs}")

    start, start_cpu = time.perf_counter(), time.process_time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = digits_part(3 if arguments.quick else arguments.epochs, arguments.seed, arguments.out)
    speed_part(2 if arguments.quick else 7)
    written += photograph_part(5 if arguments.quick else 300, arguments.seed, arguments.out)

    meaning = (
        "the trained model, with its configuration",
        "its bias tables, a heat map per block and head",
        "what chosen queries of china.jpg look at",
        "what the model makes of a noisy photograph",
    )
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    print(f"\nWritten in {wall:.0f} s ({cpu:.0f} s of CPU):")
    for path, what in zip(written, meaning):
        print(f"   {path!s:40s} {what}")
    print(
        "\nTry next:\n"
        "   python -m natrpb explain --size 10 10 --kernel-size 5 --query 0 4     who sees whom, and with which bias\n"
        "   python -m natrpb explain --size 16 16 --kernel-size 5 --dilation 3 --query 8 8 --plot out/demo/dilated.png\n"
        "   python -m examples.digits --seed 1 --epochs 40\n"
        '   python -c "import natrpb; print(natrpb.list_models())"                models with published weights'
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # its lines keep their place among the progress bars, piped or not
    main()
