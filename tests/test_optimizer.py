"""Parameter groups and the learning rate of a step."""

import math

import pytest
import torch
from torch import nn

from sam2train.errors import UserError
from sam2train.optimizer import (
    OptimizerConfig,
    build_optimizer,
    learning_rate_factor,
    set_learning_rates,
)


def parameters():
    shapes = {
        "memory_attention.layers.0.linear1.weight": (4, 3),
        "memory_attention.layers.0.linear1.bias": (4,),
        "memory_attention.norm.weight": (4,),
        "memory_encoder.out_proj.weight": (2, 3, 1, 1),
        "sam_mask_decoder.iou_token.weight": (1, 4),
        "maskmem_tpos_enc": (7, 1, 1, 2),
    }
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


def settings_of(optimizer, parameter):
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group["lr"], group["weight_decay"]


def test_every_parameter_is_in_one_group():
    named = parameters()
    optimizer = build_optimizer(named, OptimizerConfig())
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in named.values())


def test_no_decay_on_vectors():
    named = parameters()
    optimizer = build_optimizer(named, OptimizerConfig(learning_rate=1e-3, weight_decay=0.2))
    for name, parameter in named.items():
        vector = name.endswith("bias") or "norm" in name
        assert settings_of(optimizer, parameter) == (1e-3, 0.0 if vector else 0.2), name


def test_decay_moves_matrices_without_a_gradient_and_leaves_vectors():
    named = parameters()
    optimizer = build_optimizer(named, OptimizerConfig(learning_rate=0.5, weight_decay=0.1))
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in named.values():
        expected = 1 - 0.5 * 0.1 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full(parameter.shape, expected))


def test_learning_rates_by_module_name_and_pattern():
    named = parameters()
    config = OptimizerConfig(
        learning_rate=1e-4,
        learning_rates={
            "memory_attention": 2e-4,
            "*.bias": 3e-4,
            "mask_decoder": 4e-4,  # the name that model.trainable_modules takes
            "maskmem_tpos_enc": 5e-4,
        },
    )
    optimizer = build_optimizer(named, config)
    rates = [settings_of(optimizer, parameter)[0] for parameter in named.values()]
    assert rates == [2e-4, 3e-4, 2e-4, 1e-4, 4e-4, 5e-4]
    assert all(group["peak_lr"] == group["lr"] for group in optimizer.param_groups)


@pytest.mark.parametrize("pattern", ["memory_atention", "image_encoder", "*.gamma", "memory_enc"])
def test_a_pattern_that_matches_nothing_is_an_error(pattern):
    config = OptimizerConfig(learning_rates={"memory_encoder": 1e-5, pattern: 1e-5})
    with pytest.raises(UserError, match=r"optimizer\.learning_rates") as caught:
        build_optimizer(parameters(), config)
    assert pattern in str(caught.value)
    assert "memory_encoder," not in str(caught.value)  # the one that does match


def test_warm_up_by_hand():
    config = OptimizerConfig(warmup_steps=4, schedule="constant")
    assert [learning_rate_factor(s, 10, config) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine_by_hand():
    config = OptimizerConfig(warmup_steps=2, final_ratio=0.1)
    factors = [learning_rate_factor(s, 10, config) for s in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.55)  # half of the eight steps: the mean of 1 and 0.1
    assert factors[4] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[-1] > 0.1
    assert learning_rate_factor(10, 10, config) == pytest.approx(0.1)
    assert learning_rate_factor(99, 10, config) == pytest.approx(0.1)  # never up again


def test_official_ratio():
    """SAM 2 goes from 5e-6 to 5e-7 without a warm-up: the defaults."""
    config = OptimizerConfig(learning_rate=5e-6)
    assert config.learning_rate * learning_rate_factor(0, 100, config) == pytest.approx(5e-6)
    assert config.learning_rate * learning_rate_factor(100, 100, config) == pytest.approx(5e-7)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_runs_shorter_than_the_warm_up(num_steps):
    config = OptimizerConfig(warmup_steps=3)
    for step in range(num_steps + 1):
        assert 0 < learning_rate_factor(step, num_steps, config) <= 1


# SAM 2's recipe: layers of the trunk, ends of their own, biases and LayerNorms


class Trunk(nn.Module):
    """Two blocks with the layer numbers that Hiera gives."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 2, 2))
        self.patch_embed = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))

    def get_num_layers(self):
        return len(self.blocks)

    def get_layer_id(self, name):
        if "pos_embed" in name or "patch_embed" in name:
            return 0
        return int(name.split("blocks.")[1].split(".")[0]) + 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.image_encoder = nn.Module()
        self.image_encoder.trunk = Trunk()
        self.image_encoder.neck = nn.Linear(2, 2)
        self.memory_encoder = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
        self.gamma = nn.Parameter(torch.ones(2))


def groups_of(config, model=None):
    """Name -> its parameter group."""
    model = model or Model()
    named = dict(model.named_parameters())
    optimizer = build_optimizer(named, config, model)
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in named.items()}, optimizer


def test_layer_decay_by_hand():
    config = OptimizerConfig(
        learning_rate=1.0,
        learning_rates={"image_encoder": 0.5},
        layer_decay=0.5,
        layer_decay_overrides={"*pos_embed*": 1.0, "image_encoder.trunk.p*": 0.25},
    )
    groups, _ = groups_of(config)
    rates = {name: group["lr"] for name, group in groups.items() if not name.endswith("bias")}
    assert rates == {
        "gamma": 1.0,
        "image_encoder.trunk.pos_embed": 0.5,  # the first override that matches
        "image_encoder.trunk.patch_embed.weight": 0.5 * 0.25,
        "image_encoder.trunk.blocks.0.0.weight": 0.5 * 0.5**2,
        "image_encoder.trunk.blocks.1.0.weight": 0.5 * 0.5,
        "image_encoder.neck.weight": 0.5,
        "memory_encoder.0.weight": 1.0,
        "memory_encoder.1.weight": 1.0,
    }


def test_layers_are_counted_from_the_model_whatever_is_trained():
    model = Model()
    named = {
        name: p for name, p in model.named_parameters() if name.startswith("image_encoder.trunk.b")
    }
    del named["image_encoder.trunk.blocks.1.0.weight"], named["image_encoder.trunk.blocks.1.0.bias"]
    config = OptimizerConfig(learning_rate=1.0, layer_decay=0.5)
    optimizer = build_optimizer(named, config, model)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_modules_end_at_learning_rates_of_their_own():
    config = OptimizerConfig(
        learning_rate=8e-4,
        learning_rates={"image_encoder": 4e-4},
        final_ratio=0.5,
        final_learning_rates={"image_encoder": 1e-4, "gamma": 0},
        layer_decay=0.5,
    )
    groups, optimizer = groups_of(config)
    steps = {}
    for step in (0, 5, 10):
        set_learning_rates(optimizer, step, 10, config)
        steps[step] = {name: group["lr"] for name, group in groups.items()}
    rates = {name: [steps[step][name] for step in steps] for name in groups}
    assert rates["memory_encoder.1.weight"] == pytest.approx([8e-4, 6e-4, 4e-4])
    assert rates["image_encoder.neck.weight"] == pytest.approx([4e-4, 2.5e-4, 1e-4])
    assert rates["image_encoder.trunk.blocks.1.0.weight"] == pytest.approx([2e-4, 1.25e-4, 5e-5])
    assert rates["gamma"] == pytest.approx([8e-4, 4e-4, 0])


def test_groups_of_an_older_checkpoint_end_where_the_config_says():
    config = OptimizerConfig(learning_rate=1e-3, final_ratio=0.2)
    _, optimizer = groups_of(config)
    for group in optimizer.param_groups:
        del group["final_ratio"]
    set_learning_rates(optimizer, 10, 10, config)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-4, 2e-4])


def test_decay_as_sam2_has_it():
    config = OptimizerConfig(weight_decay=0.2, no_weight_decay="biases_and_layer_norm")
    groups, _ = groups_of(config)
    undecayed = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert undecayed == {name for name in groups if "bias" in name} | {"memory_encoder.0.weight"}
    groups, _ = groups_of(OptimizerConfig(weight_decay=0.2))
    assert groups["gamma"]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"final_learning_rates": {"mask_decoder": 1e-6}}, "final_learning_rates: mask_decoder"),
        ({"layer_decay_overrides": {"*rel_pos*": 1.0}}, r"layer_decay_overrides: \*rel_pos\*"),
        ({"layer_decay_overrides": {"gamma": 1.0}}, "layer_decay_overrides: gamma"),
        ({"final_learning_rates": {"gamma": 1.0}}, "gamma would go from 0.0001 up to 1"),
    ],
)
def test_settings_of_the_recipe_that_cannot_work(settings, message):
    with pytest.raises(UserError, match=message):
        groups_of(OptimizerConfig(**settings))
