"""What is measured: a model, its input, and how wide."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row group of a benchmark; plain values, so that it travels to the workers as JSON."""

    model: str
    batch: int = 1
    #: height and width of the input; 0: the model's default
    size: int = 0
    #: a key of `DTYPES`
    dtype: str = "float32"
    threads: int = 1
    #: classify scikit-learn's photograph instead of random pixels
    photo: bool = False
    seed: int = 0
    #: a training step instead of a forward; below float32 under autocast
    train: bool = False

    @property
    def title(self) -> str:
        """The case in a few words."""
        short = self.model.removeprefix("mobilenetv4_")
        size = f" {self.size}px" if self.size else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        job = " training step" if self.train else ""
        return f"{short}{size} batch {self.batch} {self.dtype} {threads}{job}"

    def resolved(self) -> Case:
        """The same case with the model's default size filled in."""
        return self if self.size else dataclasses.replace(self, size=default_size(self.model))


def default_size(model: str) -> int:
    """Side of the image that `model`'s timm configuration is made for."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(model)
    if config is None:
        raise ValueError(f"`model` must be a model of timm that has a configuration, got {model!r}")
    return int(config.input_size[-1])


def create_model(case: Case) -> nn.Module:
    """`case`'s model in the mode that is measured, float32, random weights and normalisation for its input."""
    import timm

    torch.manual_seed(case.seed)
    model = timm.create_model(case.model, pretrained=False).eval()
    return randomise(model, create_input(dataclasses.replace(case, batch=1)), case.seed).train(case.train)


def randomise(model: nn.Module, x: torch.Tensor, seed: int = 0) -> nn.Module:
    """Gives BatchNorms and layer scales values that show errors; fresh ones are 0, 1 and 1e-5. In place.

    Statistics are those of `x` on its way through the model, perturbed: with made-up ones
    activations grow from block to block until attention is a hard choice that any rounding
    tips, as no trained network does. In float64, so that every process finds the same ones.

    Args:
        model: any module in eval mode; its BatchNorm statistics and affine parameters and
            its `gamma` parameters (timm's LayerScale) are overwritten.
        x: what `model` takes.
        seed: of the values.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    def adapt(norm: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if isinstance(norm.running_mean, torch.Tensor) and isinstance(norm.running_var, torch.Tensor):
            # of all channels together: one that is silent for this input would shout for others
            power = arguments[0].pow(2).mean()
            norm.running_var.copy_(power * uniform(norm.running_var, 0.5, 1.5))
            norm.running_mean.copy_(power.sqrt() * uniform(norm.running_mean, -0.3, 0.3))

    handles = []
    with torch.no_grad():
        for module in model.double().modules():
            if isinstance(module, nn.BatchNorm2d):
                handles.append(module.register_forward_pre_hook(adapt))
                if module.affine:
                    module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                    module.bias.copy_(uniform(module.bias, -0.2, 0.2))
            gamma = getattr(module, "gamma", None)
            if isinstance(gamma, nn.Parameter):
                gamma.copy_(uniform(gamma, 0.2, 1.0))
        model(x.double())
    for handle in handles:
        handle.remove()
    return model.float()


def create_input(case: Case) -> torch.Tensor:
    """[batch, 3, size, size] float32: random pixels, or the photograph repeated."""
    case = case.resolved()
    if case.photo:
        return photograph(case.size).expand(case.batch, -1, -1, -1).contiguous()
    generator = torch.Generator().manual_seed(case.seed)
    return torch.randn((case.batch, 3, case.size, case.size), generator=generator)


def photograph(size: int) -> torch.Tensor:
    """[1, 3, size, size] float32: scikit-learn's `china.jpg`, centre square, resized, normalised as ImageNet is."""
    from sklearn.datasets import load_sample_image

    pixels = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1).float() / 255
    side = min(pixels.shape[1:])
    top, left = (pixels.shape[1] - side) // 2, (pixels.shape[2] - side) // 2
    square = pixels[None, :, top : top + side, left : left + side]
    image = torch.nn.functional.interpolate(square, (size, size), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
