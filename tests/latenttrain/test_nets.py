import json

import pytest
import torch

from latentprep.errors import UsageError
from latenttrain.nets import ARCHITECTURES, NetConfig, build_net, count_parameters
from latenttrain.stems import STEMS

GRIDS = [(8, 8), (9, 31), (28, 28), (40, 24), (64, 64)]


def config(latent=(4, 28, 28), **changes):
    quantizer = {"bits": 4, "lo": (-2.0,) * latent[0], "step": (0.25,) * latent[0]}
    return NetConfig(**{"latent": latent, "classes": 10, **quantizer, **changes})


def random_codes(config, batch=2):
    return torch.randint(0, 2**config.bits, (batch, *config.latent), dtype=torch.uint8)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_every_grid_gives_one_logit_a_class(arch, height, width):
    net = build_net(config((4, height, width), arch=arch)).eval()
    logits = net(random_codes(net.config))
    assert logits.shape == (2, 10)
    assert logits.dtype == torch.float32


def test_mobilenetv2_runs_on_photographs_in_training():
    net = build_net(config((3, 224, 224), bits=8, arch="mobilenetv2", width=0.25))
    net(random_codes(net.config)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_stay_channels_last(arch):
    net = build_net(config(arch=arch))
    wrong = []

    def look(name):
        return lambda _module, _inputs, outputs: wrong.extend(
            name for g in outputs if g is not None and not g.is_contiguous(memory_format=torch.channels_last)
        )

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_full_backward_hook(look(name))
    net(random_codes(net.config, 8)).logsumexp(1).sum().backward()
    assert wrong == []


def test_default_stays_under_its_parameter_ceiling():
    assert count_parameters(build_net(config())) <= 260_000
    assert count_parameters(build_net(config((12, 16, 16), bits=6))) <= 260_000


@pytest.mark.parametrize(
    ("channels", "width", "parameters"), [(3, 1, 2_236_682), (3, 0.25, 250_922), (4, 0.25, 250_994)]
)
def test_mobilenetv2_has_as_many_parameters_as_published(channels, width, parameters):
    assert count_parameters(build_net(config((channels, 28, 28), arch="mobilenetv2", width=width))) == parameters


@pytest.mark.parametrize("stem", STEMS)
def test_forward_is_planes_then_logits(stem):
    net = build_net(config(stem=stem)).eval()
    codes = random_codes(net.config)
    assert torch.equal(net(codes), net.logits(net.planes(codes)))


@pytest.mark.parametrize("stem", STEMS)
def test_every_parameter_learns(stem):
    net = build_net(config((4, 8, 8), stem=stem))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    codes = random_codes(net.config, batch=10)
    for _ in range(3):  # residual branches start at zero, so their inner weights move from the second step on
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(codes), torch.arange(10)).backward()
        optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_the_activation_is_that_of_the_configuration():
    nets = {}
    for activation in ("hardswish", "relu"):
        torch.manual_seed(0)
        nets[activation] = build_net(config(activation=activation)).eval()
    codes = random_codes(nets["relu"].config)
    assert nets["relu"].state_dict().keys() == nets["hardswish"].state_dict().keys()
    assert not torch.allclose(nets["relu"](codes), nets["hardswish"](codes))
    with pytest.raises(UsageError, match="activation must be hardswish or relu, got swish"):
        config(activation="swish")


def test_further_convolutions_on_the_full_grid_keep_within_the_parameters():
    nets = [build_net(config(full_grid=count)).eval() for count in (1, 2)]
    assert [count_parameters(net) for net in nets] == [240_010, 249_290]
    assert nets[1](random_codes(nets[1].config)).shape == (2, 10)
    with pytest.raises(UsageError, match="full_grid must be a whole number from 1 to 8"):
        config(full_grid=0)


def test_same_seed_gives_the_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_net(config(stem="embedding")).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_width_and_depth_grow_the_network():
    parameters = [count_parameters(build_net(config(width=w, depth=d))) for w, d in ((0.5, 1), (1, 1), (1, 2), (2, 2))]
    assert parameters == sorted(set(parameters))


def test_config_survives_json():
    one = config((5, 16, 20), bits=3, arch="mobilenetv2", stem="ordinal", width=0.5, depth=1.2)
    assert NetConfig.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "mobilnetv2"}, "mobilenetv2"),
        ({"stem": "bitplanes"}, "bitplane"),
        ({"bits": 9}, "1 to 8"),
        ({"classes": 1}, "2 classes"),
        ({"latent": (4, 4, 4)}, "8 x 8"),
        ({"latent": (4, 28)}, "channels x height x width"),
        ({"lo": (0.0,)}, "4 finite numbers"),
        ({"step": (0.0,) * 4}, "above 0"),
        ({"width": float("nan")}, "0.05 to 20"),
        ({"depth": 0}, "0.05 to 20"),
    ],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(UsageError, match=words):
        build_net(NetConfig.from_json({**config().to_json(), **changes}))


@pytest.mark.parametrize("fields", [{"colour": 3}, {"latent": None}, {}])
def test_foreign_json_is_refused(fields):
    with pytest.raises(UsageError):
        NetConfig.from_json(fields)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_on_a_line_a_network_has_the_same_weights_along_time(arch: str) -> None:
    square, line = (
        build_net(NetConfig((4, *grid), 3, 4, (0.0,) * 4, (1.0,) * 4, arch=arch)) for grid in ((16, 16), (1, 50))
    )
    assert count_parameters(line) == count_parameters(square)
    kernels = {module.kernel_size for module in line.body.modules() if isinstance(module, torch.nn.Conv2d)}
    assert kernels == {(1, 1), (1, 9)}
    codes = torch.randint(0, 16, (2, 4, 1, 50), dtype=torch.uint8)
    line.eval()
    before = line(codes)
    assert before.shape == (2, 3)
    changed = codes.clone()
    changed[0, :, :, 40:] = 0
    after = line(changed)
    assert not torch.equal(before[0], after[0]) and torch.allclose(before[1], after[1])


def test_a_line_needs_eight_cells() -> None:
    with pytest.raises(UsageError, match="or 1 x 8"):
        NetConfig((4, 1, 7), 3, 4, (0.0,) * 4, (1.0,) * 4)
    with pytest.raises(UsageError):
        NetConfig((4, 2, 50), 3, 4, (0.0,) * 4, (1.0,) * 4)
