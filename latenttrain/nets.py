"""Networks from codes to logits, and their size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprep.errors import UsageError, check_number, check_whole, check_word, nearest, opt
from latentprep.format.quantizer import MOST_BITS, MOST_TOKEN_BITS
from latenttrain.networks import adopt, find_network
from latenttrain.stems import STEMS, TOKEN_STEM, TOKEN_STEMS, AffineStem, CodebookStem


@dataclass(frozen=True)
class NetConfig:
    """Everything needed to build a network, and to interpret codes with it."""

    latent: tuple[int, int, int]  # C, h, w
    classes: int
    bits: int  # the quantizer: latents are about lo + (codes + 0.5) * step
    lo: tuple[float, ...]
    step: tuple[float, ...]
    arch: str = "latentnet"  # or another name in `ARCHITECTURES`, or of `latenttrain.networks`
    stem: str = "affine"
    width: float = 1.0
    depth: float = 1.0
    full_grid: int = 1  # 3 x 3 convolutions of latentnet before it halves the grid
    activation: str = "hardswish"  # of latentnet; mobilenetv2 has its own
    filter: tuple[float, ...] = ()  # the quantizer's, [C,C,3,3] in a row, if its codes were chosen jointly
    mean: tuple[float, ...] = ()  # of each channel's codes, as the stem takes it; without it, the rule of `AffineStem`
    std: tuple[float, ...] = ()
    channel_bits: tuple[int, ...] = ()  # empty: `bits` in each
    dim: int = 0  # of the vectors that codes name, if they are tokens

    def __post_init__(self) -> None:
        for name, kind in (
            ("latent", int), ("lo", float), ("step", float), ("filter", float), ("mean", float), ("std", float),
            ("channel_bits", int),
        ):  # fmt: skip
            object.__setattr__(self, name, tuple(kind(value) for value in getattr(self, name)))
        grid = self.latent[-1:] if on_a_line(self.latent) else self.latent[1:]
        if len(self.latent) != 3 or self.latent[0] < 1 or min(grid) < 8:
            raise UsageError(
                f"a latent must be channels x height x width with 8 x 8 cells or more, or 1 x 8, got {self.latent}",
                f"encode at a larger {opt('size')}, or sound for more {opt('seconds')}",
            )
        if self.classes < 2:
            raise UsageError(f"a network needs 2 classes or more, got {self.classes}", "add a second class")
        most = MOST_TOKEN_BITS if self.dim else MOST_BITS
        check_whole("bits", self.bits, 1, most, f"encode with {opt('bits')} 1 to {most}")
        if not self.channel_bits:
            object.__setattr__(self, "channel_bits", (self.bits,) * self.latent[0])
        each = self.channel_bits
        if len(each) != self.latent[0] or min(each) < 0 or max(each) != self.bits:
            raise UsageError(
                f"channel_bits must be {self.latent[0]} numbers from 0 to {self.bits}, the largest {self.bits}, got "
                f"{each}",
                "take it from the dataset's manifest",
            )
        for name in ("lo", "step", *(("mean", "std") if self.mean or self.std else ())):
            values = getattr(self, name)
            if len(values) != self.latent[0] or not all(map(math.isfinite, values)):
                raise UsageError(
                    f"{name} must be {self.latent[0]} finite numbers, one per channel, got {values}",
                    "take it from the dataset's manifest",
                )
        if self.filter and (len(self.filter) != 9 * self.latent[0] ** 2 or not all(map(math.isfinite, self.filter))):
            raise UsageError(
                f"filter must be {9 * self.latent[0] ** 2} finite numbers, got {len(self.filter)}",
                "take it from the dataset's manifest",
            )
        if min(self.step) <= 0:
            raise UsageError(f"step must be above 0, got {self.step}", "take it from the dataset's manifest")
        if min(self.std, default=0) < 0:
            raise UsageError(f"std must be 0 or more, got {self.std}", "take it from the dataset's manifest")
        if type(self.dim) is not int or not 0 <= self.dim <= 1 << 16:
            raise UsageError(f"dim must be a whole number up to {1 << 16}, got {self.dim!r:.60}")
        stems = [*STEMS, *TOKEN_STEMS[:1]] if self.dim else list(STEMS)
        for name, allowed in (("stem", stems), ("activation", list(ACTIVATIONS))):
            check_word(name, getattr(self, name), allowed)
        if not isinstance(self.arch, str):
            raise UsageError(f"{opt('arch')} must be a name, got {self.arch!r:.60}")
        check_whole("full_grid", self.full_grid, 1, 8, "leave it out for 1")
        for name in ("width", "depth"):
            check_number(name, getattr(self, name), 0.05, 20, f"{opt(name, 1)} is the default")

    def to_json(self) -> dict:
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        if min(self.channel_bits) == self.bits:  # as earlier versions write it, and read it
            del fields["channel_bits"]
        if not self.dim:
            del fields["dim"]
        return fields

    @property
    def reads_stages(self) -> bool:
        """Whether codes are tokens, and the stem sums up the vectors that they name."""
        return self.dim > 0 and self.stem in TOKEN_STEMS

    @classmethod
    def from_json(cls, fields: dict) -> NetConfig:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UsageError(f"unknown network setting {name!r}", nearest(name, known))
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise UsageError(f"not a network's settings: {error}", f"give {', '.join(known)}") from error


def on_a_line(latent: Sequence[int]) -> bool:
    """Whether a grid, (C, h, w), is one cell high, as those of tokens of sound are: then it only runs along time."""
    return len(latent) == 3 and latent[1] == 1


def lay_along_time(body: nn.Module) -> None:
    """Make square convolutions and poolings those of a line: 3 x 3 weights become 1 x 9, as many in a row."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            outputs, inputs, *sides = module.weight.shape
            taps = math.prod(sides)
            module.weight = nn.Parameter(module.weight.detach().reshape(outputs, inputs, 1, taps))
            module.kernel_size, module.stride = (1, taps), (1, module.stride[1])
            module.padding = (0, taps // 2)
        elif isinstance(module, nn.AvgPool2d):
            module.kernel_size = module.stride = (1, module.kernel_size)  # type: ignore[assignment]


class Net(nn.Module):
    """Codes to logits: a stem that makes planes of the codes, and a body that classifies the planes."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.parts: tuple[int, ...] = ()
        self.stem: nn.Module
        if config.reads_stages:
            self.stem = CodebookStem(config.latent[0], config.bits, config.dim, learned=config.stem != TOKEN_STEM)
        else:
            self.stem = STEMS[config.stem](config.latent[0], config.channel_bits, config.mean, config.std)
        # What stands for latents of 0, seldom a whole code; or, where the stem reads neighbours, the planes that do.
        self.zeros = tuple(-lo / step - 0.5 for lo, step in zip(config.lo, config.step, strict=True))
        if isinstance(self.stem, AffineStem) and config.filter:
            self.stem.set_filter(config.filter, config.step)
            self.zeros = tuple(self.stem.normalized(torch.tensor(self.zeros)[:, None, None]).flatten().tolist())
        self.frozen: str | None = None
        planes = int(self.stem.planes)  # type: ignore[arg-type]
        self.body: nn.Module
        if config.arch in ARCHITECTURES:
            self.body = ARCHITECTURES[config.arch](planes, config)
            if on_a_line(config.latent):
                lay_along_time(self.body)
        else:
            self.body = find_network(config.arch, ARCHITECTURES)(planes, config)
            adopt(self.body, config.arch, (planes, *config.latent[1:]), config.classes, BatchNorm)

    def cut_into(self, parts: tuple[int, ...]) -> None:
        """From now on batches consist of parts of so many samples, each with its own BatchNorm statistics and its own
        partners to mix with. Without parts a batch is one."""
        if parts != self.parts:
            self.parts = parts
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.parts = parts

    @property
    def head(self) -> tuple[str, nn.Linear]:
        """The layer that makes the logits, and its name among the network's modules: the last `nn.Linear`.

        Raises `UsageError` if that one has not an output for each class, in a network that others wrote.
        """
        linear = [(name, module) for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        if not linear or linear[-1][1].out_features != self.config.classes:
            raise UsageError(
                f"the network {self.config.arch} has no head to tell from the rest",
                "let its last layer be an nn.Linear with an output for each class",
            )
        return linear[-1]

    @property
    def features(self) -> int:
        """Inputs of the head."""
        return self.head[1].in_features

    def freeze(self, part: str | None) -> None:
        """From now on a part of the network stays as it is, the statistics of its BatchNorm layers, too.

        part: ``stem``, the stem and the first layer of the body; ``body``, all but the head; None, nothing.
        Raises `UsageError` if nothing is left to learn.
        """
        self.frozen = part
        if part == "body":
            self.requires_grad_(False)
            self.head[1].requires_grad_(True)
        for module in self._first_layers() if part == "stem" else ():
            module.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UsageError(f"{opt('freeze')} {part} leaves nothing to learn in the network {self.config.arch}")

    def _first_layers(self) -> list[nn.Module]:
        return [self.stem, next(self.body.children(), self.body)]

    def train(self, mode: bool = True) -> Net:
        super().train(mode and self.frozen != "body")  # a head's result does not depend on the mode
        for module in self._first_layers() if self.frozen == "stem" else ():
            module.eval()
        return self

    @property
    def reads_neighbours(self) -> bool:
        """Whether the stem reads a code by those around it: the affine one, if codes were chosen jointly."""
        return isinstance(self.stem, AffineStem) and self.stem.kernel is not None

    def planes(self, codes: Tensor) -> Tensor:
        """u8 [B,C,h,w], or f32 where augmentation moved codes within their steps -> f32 [B,P,h,w]"""
        return self.stem(codes)

    def logits(self, planes: Tensor, dropout: Tensor | None = None) -> Tensor:
        """float [B,P,h,w] -> f32 [B,classes]

        dropout: f32 [B,features] in 0…1, drawn by whoever trains, so that a step is a pure function; see `DROPOUT`.
        """
        features = planes.contiguous(memory_format=torch.channels_last)
        if dropout is None:
            return self.body(features).float()
        share = DROPOUT[self.config.arch]
        *layers, head = self.body.children()  # of an `nn.Sequential`, as all networks in `DROPOUT` are
        for layer in layers:
            features = layer(features)
        return head(features * (dropout >= share) / (1 - share)).float()

    def forward(self, codes: Tensor) -> Tensor:
        """u8 [B,C,h,w] -> f32 [B,classes]"""
        return self.logits(self.planes(codes))


def build_net(config: NetConfig) -> Net:
    """A network with fresh weights, drawn from torch's global generator.

    Raises `UsageError` for one that is not installed, or that others wrote and that cannot be trained here.
    """
    return Net(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the grid (but for its stride), and BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, BatchNorm(outputs))


MOMENTUM = 0.1  # with which BatchNorm's running statistics follow each batch's


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, which can take its statistics in training over parts of a batch, each for itself.

    parts: how many samples each part has, in order; the running statistics follow the mean over all parts, weighted by
    their samples. Such "ghost batches" (Hoffer, Hubara and Soudry 2017, https://arxiv.org/abs/1705.08741) make a result
    independent of how many samples a device computes at once.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float  # `MOMENTUM`, which is torch's default, too
    parts: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """float [B,C,h,w] -> [B,C,h,w]"""
        if not self.training or len(self.parts) < 2:
            return super().forward(x)
        results, start = [], 0
        mean_sum, var_sum = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        for size in sorted(set(self.parts), reverse=True):  # `cut` makes at most two sizes, the larger ones first
            count = self.parts.count(size)
            group = x[start : start + count * size].float().unflatten(0, (count, size))
            start += count * size
            var, mean = torch.var_mean(group, (1, 3, 4), correction=0, keepdim=True)  # [count,1,C,1,1]
            weight, bias = (values[:, None, None] for values in (self.weight, self.bias))
            results.append(((group - mean) * torch.rsqrt(var + self.eps) * weight + bias).flatten(0, 1).to(x.dtype))
            values = size * x.shape[2] * x.shape[3]
            mean_sum = mean_sum + size * mean.detach().sum(0).flatten()
            var_sum = var_sum + size * var.detach().sum(0).flatten() * (values / max(1, values - 1))
        self.running_mean.lerp_(mean_sum / len(x), self.momentum)
        self.running_var.lerp_(var_sum / len(x), self.momentum)
        return torch.cat(results) if len(results) > 1 else results[0]


class Residual(nn.Module):
    """``act(x + branch(x))``; the branch starts at zero, a changed shape is met by pooling and a 1 x 1 convolution."""

    def __init__(
        self, branch: nn.Sequential, inputs: int, outputs: int, stride: int, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        self.branch = branch
        self.activation = activation()
        nn.init.zeros_(branch[-1][1].weight)  # type: ignore[index]
        shortcut: list[nn.Module] = []
        if stride > 1:
            shortcut.append(nn.AvgPool2d(stride, ceil_mode=True))
        if inputs != outputs:
            shortcut.append(convolution(inputs, outputs, 1))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shortcut(x) + self.branch(x))


def dense(inputs: int, outputs: int, stride: int, act: type[nn.Module]) -> Residual:
    """Two 3 x 3 convolutions: many FLOPs and few parameters while the grid is large and the channels few."""
    return Residual(
        nn.Sequential(convolution(inputs, outputs, 3, stride), act(), convolution(outputs, outputs)),
        inputs, outputs, stride, act,
    )  # fmt: skip


def bottleneck(inputs: int, outputs: int, stride: int, act: type[nn.Module]) -> Residual:
    """A 3 x 3 convolution between 1 x 1 convolutions, on three eighths of the channels."""
    inner = round_width(outputs, 3 / 8)
    return Residual(
        nn.Sequential(
            convolution(inputs, inner, 1), act(), convolution(inner, inner, 3, stride), act(),
            convolution(inner, outputs, 1),
        ),
        inputs, outputs, stride, act,
    )  # fmt: skip


def latentnet(planes: int, config: NetConfig) -> nn.Sequential:
    """The default: the full grid is only read, dense blocks work at half of it and bottlenecks at a quarter.

    benchmarks/records/net_search.md has what it was chosen from. float [B,P,h,w] -> [B,classes]
    """
    channels, act = round_width(32, config.width), ACTIVATIONS[config.activation]
    layers: list[nn.Module] = [convolution(planes, channels), act()]
    for _ in range(config.full_grid - 1):
        layers += [convolution(channels, channels), act()]
    for block, base, blocks, stride in ((dense, 64, 2, 2), (bottleneck, 128, 3, 2)):
        outputs = round_width(base, config.width)
        for index in range(round_depth(blocks, config.depth)):
            layers.append(block(channels, outputs, 1 if index else stride, act))
            channels = outputs
    return nn.Sequential(*layers, GlobalPool(), nn.Flatten(), nn.Linear(channels, config.classes))


class GlobalPool(nn.Module):
    """The mean over the grid. `nn.AdaptiveAvgPool2d` computes the same, but its gradients come channels first, and all
    layers back to the next convolution follow them: on CPUs BatchNorm's backward pass then takes five times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        """float [B,C,h,w] -> [B,C,1,1]"""
        return F.avg_pool2d(x, x.shape[2:])


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, depthwise 3 x 3, narrow without an activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        widen = [convolution(inputs, inner, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [convolution(inner, inner, 3, stride, groups=inner), nn.ReLU6()]
        self.branch = nn.Sequential(*widen, *depthwise, convolution(inner, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)


# expansion, channels, blocks, stride of the first block: table 2 of https://arxiv.org/abs/1801.04381
MOBILENETV2 = (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)


# The share of the last layer's inputs that training zeroes; an Identity keeps the place of torchvision's Dropout layer.
DROPOUT = {"mobilenetv2": 0.2}


def mobilenetv2(planes: int, config: NetConfig) -> nn.Sequential:
    """MobileNetV2 as torchvision counts it: below width 1 the last layer keeps its 1280 channels.

    A grid one cell wide is not strided any more: there is nothing left to leave out, and oneDNN (torch 2.13, bfloat16)
    returns uninitialized memory for the weight gradient of such a convolution. float [B,P,h,w] -> [B,classes]
    """
    side = -(
        -(config.latent[2] if on_a_line(config.latent) else min(config.latent[1:])) // 2
    )  # after the first convolution
    channels = round_width(32, config.width)
    layers: list[nn.Module] = [convolution(planes, channels, 3, stride=2), nn.ReLU6()]
    for expansion, base, blocks, stride in MOBILENETV2:
        outputs = round_width(base, config.width)
        for index in range(round_depth(blocks, config.depth)):
            step = 1 if index or side == 1 else stride
            layers.append(InvertedResidual(channels, outputs, step, expansion))
            channels, side = outputs, -(-side // step)
    last = round_width(1280, max(1.0, config.width))
    layers += [convolution(channels, last, 1), nn.ReLU6(), GlobalPool(), nn.Flatten(), nn.Identity()]
    return nn.Sequential(*layers, nn.Linear(last, config.classes))


ARCHITECTURES = {"latentnet": latentnet, "mobilenetv2": mobilenetv2}
# Hardswish trains to what SiLU does at nearly the cost of ReLU: Howard et al. 2019, https://arxiv.org/abs/1905.02244
ACTIVATIONS: dict[str, type[nn.Module]] = {"hardswish": nn.Hardswish, "relu": nn.ReLU}


def round_width(channels: int, width: float, divisor: int = 8) -> int:
    """``channels * width`` to the nearest multiple of ``divisor``, never below 90% of it (EfficientNet's rule)."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_depth(blocks: int, depth: float) -> int:
    """``blocks * depth``, rounded up (EfficientNet's rule), so that no stage ever loses its last block."""
    return math.ceil(round(blocks * depth, 6))  # 6 digits: 5 * 1.2 is 6 blocks, whatever binary fractions say


def count_parameters(net: nn.Module) -> int:
    """Weights, frozen ones too."""
    return sum(parameter.numel() for parameter in net.parameters())


def count_flops(net: Net) -> int:
    """Forward FLOPs of one sample as torch counts them: convolutions and matrix products only.

    A multiply-add is 2 FLOPs. A training step costs about three times as much: the forward pass and both gradients.
    torch's own count of the gradients (2.13) ignores groups, and is twenty times too high for depthwise convolutions.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(net.parameters()).device
    codes = torch.zeros(1, *net.config.latent, dtype=torch.uint8, device=device)
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(codes)
    finally:
        net.train(training)
    return counter.get_total_flops()
