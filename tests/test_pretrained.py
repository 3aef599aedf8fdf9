"""SAM 2 found, built and loaded: names, counts, temporal rows, and files that are wrong."""

import pytest
import torch
import yaml

from sam2train import pretrained
from sam2train.config_yaml import load_yaml
from sam2train.errors import UserError
from sam2train.files import REPOSITORY
from sam2train.pretrained import (
    DOWNLOAD_ADDRESS,
    MEMORY,
    MODULES,
    PUBLISHED,
    build_sam2,
    fit_temporal_rows,
    fit_untrained_rows,
    load_weights,
    match_parameters,
    resolve_config,
)

DEMO = REPOSITORY / "sam2train" / "configs" / "sam2.1_hiera_demo.yaml"


def build_demo(**options):
    return build_sam2(DEMO, **{"image_size": 64, "num_maskmem": 7, **options})


@pytest.fixture(scope="module")
def demo():
    torch.manual_seed(0)
    return build_demo()


@pytest.fixture
def weights(demo):
    return {name: value.clone() for name, value in demo.state_dict().items()}


def save(path, weights):
    torch.save({"model": weights}, path)
    return path


# -- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["t", "s", "b+", "l"])
@pytest.mark.parametrize("form", ["configs/sam2.1/{}", "configs/{}", "{}"])
def test_config_by_name_and_short_form(size, form):
    name = f"sam2.1_hiera_{size}.yaml"
    path = resolve_config(form.format(name))
    assert path.is_file()
    assert path.parts[-4:] == ("sam2", "configs", "sam2.1", name)


def test_config_of_sam2_without_the_1():
    assert resolve_config("configs/sam2_hiera_t.yaml").parts[-2:] == ("sam2", "sam2_hiera_t.yaml")


def test_config_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text(DEMO.read_text())
    assert resolve_config(path) == path
    monkeypatch.chdir(tmp_path)
    assert resolve_config("mine.yaml").samefile(path)
    # A name relative to the repository is found from anywhere.
    assert resolve_config("sam2train/configs/sam2.1_hiera_demo.yaml") == DEMO


@pytest.mark.parametrize(
    "name", ["configs/sam2.1_hiera_x.yaml", "other/sam2.1_hiera_t.yaml", "configs", ""]
)
def test_unknown_config_lists_what_exists(name):
    with pytest.raises(UserError, match=r"model\.config_path") as caught:
        resolve_config(name)
    message = str(caught.value)
    assert repr(name) in message
    for known in ("sam2.1_hiera_t", "sam2.1_hiera_b+", "sam2_hiera_l", "sam2.1_hiera_demo"):
        assert f"{known}.yaml" in message
    assert "training" not in message


@pytest.mark.parametrize(
    "text", ["", "a: 1", "model: 3", "model: {a: 1}", "- 1", "model: [", "model: {_target_: a.b.C}"]
)
def test_a_file_that_is_no_sam2_config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"model\.config_path") as caught:
        build_sam2(path, image_size=64, num_maskmem=7)
    assert str(path) in str(caught.value)


def test_a_training_config_is_no_model_config():
    path = resolve_config("configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml")
    with pytest.raises(UserError, match="no `model:` node"):
        build_sam2(path, image_size=64, num_maskmem=7)


# -- building -------------------------------------------------------------------------------------


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def test_tiny_has_the_published_parameters():
    tiny = build_sam2(resolve_config("configs/sam2.1_hiera_t.yaml"), image_size=512, num_maskmem=7)
    assert {name: count(getattr(tiny, MODULES[name]).parameters()) for name in MODULES} == {
        "image_encoder": 27_219_136,
        "memory_attention": 5_922_304,
        "memory_encoder": 1_384_608,
        "prompt_encoder": 6_220,
        "mask_decoder": 4_215_109,
    }
    assert count(tiny.parameters()) == 38_962_498
    assert tiny.image_size == 512
    assert tiny.memory_attention.layers[0].self_attn.freqs_cis.shape[0] == 32 * 32


def test_demo_is_small(demo):
    assert count(demo.parameters()) == 2_585_298
    assert type(demo).__name__ == "SAM2Base"


@pytest.mark.parametrize("image_size", [64, 96, 160])
def test_rope_tables_follow_the_image_size(image_size):
    attention = build_demo(image_size=image_size).memory_attention.layers[0]
    tokens = (image_size // 16) ** 2
    assert attention.self_attn.freqs_cis.shape[0] == tokens
    assert attention.cross_attn_image.freqs_cis.shape[0] == tokens


def test_options_reach_the_model():
    sam2 = build_demo(max_obj_ptrs_in_encoder=4, use_signed_tpos_enc_to_obj_ptrs=False)
    assert sam2.max_obj_ptrs_in_encoder == 4
    assert sam2.use_signed_tpos_enc_to_obj_ptrs is False


def test_unknown_option_names_the_near_ones():
    with pytest.raises(UserError, match=r"'max_obj_ptr_in_encoder'; did you mean max_obj_ptrs"):
        build_demo(max_obj_ptr_in_encoder=4)
    with pytest.raises(UserError, match="'zzz'"):
        build_demo(zzz=1)


# -- loading --------------------------------------------------------------------------------------


def test_load_is_exact(tmp_path, weights):
    sam2 = build_demo()
    assert not torch.equal(sam2.no_mem_embed, weights["no_mem_embed"])
    load_weights(sam2, save(tmp_path / "w.pt", weights))
    for name, value in sam2.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_half_precision_file(tmp_path, weights):
    path = save(tmp_path / "half.pt", {name: value.half() for name, value in weights.items()})
    for num_maskmem in (7, 9):
        sam2 = build_demo(num_maskmem=num_maskmem)
        load_weights(sam2, path)
        assert {parameter.dtype for parameter in sam2.parameters()} == {torch.float32}
        assert torch.equal(sam2.no_mem_embed, weights["no_mem_embed"].half().float())


def test_missing_tensor(tmp_path, weights):
    del weights["obj_ptr_tpos_proj.weight"]
    with pytest.raises(UserError, match=r"missing obj_ptr_tpos_proj\.weight \(32, 64\)"):
        load_weights(build_demo(), save(tmp_path / "w.pt", weights))


def test_unexpected_tensor(tmp_path, weights):
    weights["extra.weight"] = torch.ones(3, 2)
    with pytest.raises(UserError, match=r"unexpected extra\.weight \(3, 2\)"):
        load_weights(build_demo(), save(tmp_path / "w.pt", weights))


def test_misshaped_tensor(tmp_path, weights):
    weights["no_mem_embed"] = torch.ones(1, 1, 65)
    with pytest.raises(UserError, match=r"no_mem_embed is \(1, 1, 65\), .* \(1, 1, 64\)"):
        load_weights(build_demo(), save(tmp_path / "w.pt", weights))


def test_weights_of_another_width_count_them_all(tmp_path, weights):
    other = {name: torch.ones(*value.shape, 2) for name, value in weights.items()}
    with pytest.raises(UserError, match=rf"{len(weights)} of {len(weights)} tensors") as caught:
        load_weights(build_demo(), save(tmp_path / "w.pt", other))
    assert "maskmem_tpos_enc" in "".join(other)
    assert str(caught.value).count("\n") < 12  # a few of them, not a page


def test_a_failed_load_changes_nothing(tmp_path, weights):
    del weights["no_obj_ptr"]
    sam2 = build_demo()
    before = {name: value.clone() for name, value in sam2.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(sam2, save(tmp_path / "w.pt", weights))
    assert all(torch.equal(value, before[name]) for name, value in sam2.state_dict().items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_published_file_names_its_address(tmp_path, demo, name):
    with pytest.raises(UserError, match="no file") as caught:
        load_weights(demo, tmp_path / name)
    assert f"{DOWNLOAD_ADDRESS}{name}" in str(caught.value)
    assert "--download" in str(caught.value)


def test_missing_other_file_names_no_address(tmp_path, demo):
    with pytest.raises(UserError, match="no file") as caught:
        load_weights(demo, tmp_path / "mine.pt")
    assert "http" not in str(caught.value)
    assert "checkpoint_path=null" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!doctype html><html><body>404</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        bytes(range(128, 192)),
        b"PK\x03\x04 cut short",
    ],
)
def test_garbage_file(tmp_path, demo, data):
    path = tmp_path / "sam2.1_hiera_tiny.pt"
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a checkpoint that torch can read") as caught:
        load_weights(demo, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"model": [1]}, {"model": {"a": 1}}, [1], {"w": 2}])
def test_file_of_another_layout(tmp_path, demo, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"does not hold .'model': state_dict"):
        load_weights(demo, tmp_path / "w.pt")


# -- temporal rows --------------------------------------------------------------------------------

# Rows of the checkpoint that a model with K rows starts from; the last one is the conditioning row.
ROWS_FROM_7 = {
    1: [6],
    2: [0, 6],
    3: [0, 1, 6],
    4: [0, 1, 2, 6],
    5: [0, 1, 2, 3, 6],
    6: [0, 1, 2, 3, 4, 6],
    7: [0, 1, 2, 3, 4, 5, 6],
    8: [0, 1, 2, 3, 4, 5, 5, 6],
    9: [0, 1, 2, 3, 4, 5, 5, 5, 6],
}
FRESH = -1.0


def numbered(count):
    return torch.arange(float(count)).view(count, 1, 1, 1).expand(-1, 1, 1, 2)


def fresh(count):
    return torch.full((count, 1, 1, 2), FRESH)


@pytest.mark.parametrize("count", ROWS_FROM_7)
def test_rows_from_7(count):
    rows = fit_temporal_rows(numbered(7), count, fresh(count))
    assert rows.shape == (count, 1, 1, 2)
    assert rows[:, 0, 0, 0].tolist() == ROWS_FROM_7[count]


def test_no_rows():
    assert fit_temporal_rows(numbered(7), 0, fresh(0)).shape == (0, 1, 1, 2)
    assert fit_temporal_rows(fresh(0), 3, fresh(3))[:, 0, 0, 0].tolist() == [FRESH] * 3


@pytest.mark.parametrize("count", ROWS_FROM_7)
def test_rows_to_7_and_back(count):
    there = fit_temporal_rows(numbered(7), count, fresh(count))
    back = fit_temporal_rows(there, 7, fresh(7))[:, 0, 0, 0].tolist()
    kept = min(count, 7) - 1
    assert back[:kept] == [0, 1, 2, 3, 4, 5][:kept]
    assert back[6] == 6
    farthest = kept - 1 if kept else FRESH  # one row alone tells nothing of tracked frames
    assert back[kept:6] == [farthest] * (6 - kept)


@pytest.mark.parametrize("count", [0, *ROWS_FROM_7])
def test_a_checkpoint_of_7_loads_into_any_number(tmp_path, weights, count):
    sam2 = build_demo(num_maskmem=count)
    load_weights(sam2, save(tmp_path / "w.pt", weights))
    expected = weights["maskmem_tpos_enc"][ROWS_FROM_7.get(count, [])]
    assert torch.equal(sam2.maskmem_tpos_enc, expected)
    assert torch.equal(sam2.no_mem_embed, weights["no_mem_embed"])


# -- rows that no training has reached ------------------------------------------------------------


@pytest.mark.parametrize(
    ("untrained", "before", "after", "rows"),
    [
        ([], 7, 7, []),
        ([1, 5, 6], 7, 7, [1, 5, 6]),
        ([1, 5], 7, 4, [1]),  # row 5 is gone, the last stays last
        ([2, 6], 7, 4, [2, 3]),
        ([], 7, 9, [6, 7]),  # copies of row 5
        ([3], 4, 6, [3, 4, 5]),
        ([], 1, 4, [0, 1, 2]),  # nothing to copy
        ([], 0, 2, [0, 1]),
        ([0, 1], 2, 0, []),
        ([], 7, 1, []),
    ],
)
def test_untrained_rows_move_with_their_rows(untrained, before, after, rows):
    found = fit_untrained_rows(untrained, before, after)
    assert list(found) == rows
    values = fit_temporal_rows(numbered(before), after, fresh(after))[:, 0, 0, 0].tolist()
    for row, why in found.items():
        if why.startswith("copies"):
            assert f"{values[row]:.0f}" == why.split()[-1]
        else:
            assert (values[row] == FRESH) == (why == "new random values"), row


def test_a_file_may_list_its_untrained_rows(tmp_path, weights):
    torch.save({"model": weights, "untrained_rows": [2, 6]}, tmp_path / "w.pt")
    assert list(load_weights(build_demo(), tmp_path / "w.pt")) == [2, 6]
    assert list(load_weights(build_demo(num_maskmem=4), tmp_path / "w.pt")) == [2, 3]
    assert load_weights(build_demo(), save(tmp_path / "silent.pt", weights)) == {}
    assert list(load_weights(build_demo(num_maskmem=9), tmp_path / "silent.pt")) == [6, 7]


@pytest.mark.parametrize("listed", ["1", [7], [[1]], ["row 1"], {1: 2}])
def test_a_list_of_untrained_rows_that_is_none(tmp_path, weights, listed):
    torch.save({"model": weights, "untrained_rows": listed}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt has untrained_rows .*which has 7 rows"):
        load_weights(build_demo(), tmp_path / "w.pt")


def test_the_demo_trained_all_of_its_rows():
    """No row of the shipped file is that of the first draw, which decay alone would have shrunk."""
    sam2 = build_demo()
    assert load_weights(sam2, REPOSITORY / "sam2train" / "weights" / "demo_base.pt") == {}
    torch.manual_seed(0)  # trainer.seed of experiments/demo_base_1.yaml
    first = build_demo().maskmem_tpos_enc.flatten(1)
    alike = torch.cosine_similarity(sam2.maskmem_tpos_enc.flatten(1), first)
    assert alike.max() < 0.7


# -- names of what is trained ---------------------------------------------------------------------


def test_match_module_parameter_and_pattern(demo):
    names = {name for name, _ in demo.named_parameters()}

    def select(*entries):
        return match_parameters(demo, entries, MODULES)

    assert select("memory_encoder") == {n for n in names if n.startswith("memory_encoder.")}
    assert select("mask_decoder") == {n for n in names if n.startswith("sam_mask_decoder.")}
    assert select("sam_mask_decoder") == select("mask_decoder")
    assert select("mask_decoder.conv_s0") == {
        "sam_mask_decoder.conv_s0.weight",
        "sam_mask_decoder.conv_s0.bias",
    }
    assert select("memory_attention.layers.1") == {
        n for n in names if n.startswith("memory_attention.layers.1.")
    }
    assert select("maskmem_tpos_enc") == {"maskmem_tpos_enc"}
    assert select("*_embed") == {"no_mem_embed", "image_encoder.trunk.pos_embed"}
    assert select("memory_attention.*.bias") == {
        n for n in names if n.startswith("memory_attention.") and n.endswith(".bias")
    }
    assert select("*") == names
    assert select() == set()
    assert select("no_obj_ptr", "maskmem_tpos_enc") == {"no_obj_ptr", "maskmem_tpos_enc"}


@pytest.mark.parametrize("prefix", ["mask", "obj_ptr", "memory.layers"])
def test_a_prefix_of_a_name_is_not_the_name(demo, prefix):
    """`mask` must not select `mask_downsample` and the mask decoder together."""
    with pytest.raises(UserError, match=r"model\.trainable_modules"):
        match_parameters(demo, [prefix], MODULES)


def test_memory_is_all_parts_of_the_memory(demo):
    selected = match_parameters(demo, ["memory"], MODULES)
    assert selected == match_parameters(demo, MEMORY, MODULES)
    assert {name.split(".")[0] for name in selected} == {
        *("memory_attention", "memory_encoder", "maskmem_tpos_enc", "no_obj_embed_spatial"),
        *("no_obj_ptr", "obj_ptr_proj", "obj_ptr_tpos_proj"),
    }
    both = match_parameters(demo, ["memory", "mask_decoder"], MODULES)
    assert both == selected | match_parameters(demo, ["mask_decoder"], MODULES)


def test_memory_takes_what_the_config_has():
    """SAM 2.0 has neither the embedding of absence nor a projection of the pointers' time code."""
    config = resolve_config("configs/sam2/sam2_hiera_t.yaml")
    sam2 = build_sam2(config, image_size=64, num_maskmem=7)
    selected = match_parameters(sam2, ["memory"], MODULES)
    tops = {name.split(".")[0] for name in selected}
    assert tops == set(MEMORY) - {"no_obj_embed_spatial", "obj_ptr_tpos_proj"}


def test_a_typo_of_memory_names_it(demo):
    with pytest.raises(UserError, match=r"did you mean memory,"):
        match_parameters(demo, ["memry"], MODULES)


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        ("memory_atention", "memory_attention"),
        ("mask_decoders", "mask_decoder"),
        ("maskmem_tpos", "maskmem_tpos_enc"),
        ("memory_attention.layer", "memory_attention.layers"),
    ],
)
def test_a_typo_names_the_near_ones(demo, entry, near):
    with pytest.raises(UserError, match="did you mean") as caught:
        match_parameters(demo, ["memory_encoder", entry], MODULES)
    assert repr(entry) in str(caught.value)
    assert near in str(caught.value).split("did you mean")[1].split("?")[0]


def test_a_far_name_lists_the_top(demo):
    with pytest.raises(UserError, match="Names at the top are") as caught:
        match_parameters(demo, ["qqq*"], MODULES)
    for name in (*MODULES, "maskmem_tpos_enc", "no_obj_ptr"):
        assert name in str(caught.value)


# -- a model config builds modules and nothing else ------------------------------------------------

TARGETS = (
    "os.system",
    "subprocess.run",
    "subprocess.Popen",
    "builtins.eval",
    "os._exit",
    "torch.load",
    "torch.hub.load",
    "torch.nn.Module.__init__.__globals__",
    "torch.nn.modules.module.torch.hub.load",
    "sam2.modeling.sam2_base.torch.hub.load",
    "sam2.modeling.sam2_utils.select_closest_cond_frames",
    "sam2.build_sam.build_sam2",
    "",
    7,
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("place", ["image_encoder", "memory_encoder", "new"])
def test_a_config_that_names_a_program_is_refused(tmp_path, place, target):
    content = yaml.safe_load(DEMO.read_text())
    content["model"].setdefault(place, {})["_target_"] = target
    content["model"][place]["command"] = f"touch {tmp_path / 'ran'}"
    (tmp_path / "evil.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=rf"evil\.yaml: model\.{place}\._target_ is"):
        build_sam2(tmp_path / "evil.yaml", image_size=64, num_maskmem=2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.exec",
        "posix.system",
        "logging.os.system",
    ],
)
def test_hydra_itself_refuses_programs_too(tmp_path, target):
    """The pinned version has this policy; 1.3.2, the least that sam2 asks for, runs them. It is a
    list of what is forbidden, and os._exit is not on it: what a config may name is ours to say."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    with pytest.raises(InstantiationException, match=r"(?i)block|not allowed|denied|restrict"):
        instantiate({"_target_": target, "_args_": [f"touch {tmp_path / 'ran'}"]})
    assert not (tmp_path / "ran").exists()
    required = (REPOSITORY / "pyproject.toml").read_text()
    assert '"hydra-core>=1.3.7,<1.4"' in required


def test_a_config_may_not_refer_to_the_environment(tmp_path):
    content = yaml.safe_load(DEMO.read_text())
    content["model"]["image_encoder"]["scalp"] = "${oc.env:WANDB_API_KEY}"
    (tmp_path / "evil.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"model\.image_encoder\.scalp is .*may not refer"):
        build_sam2(tmp_path / "evil.yaml", image_size=64, num_maskmem=2)


def test_a_config_that_unfolds_is_refused(tmp_path):
    text = "a0: &a0 [1, 1]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    (tmp_path / "bomb.yaml").write_text(text + "model: {_target_: x}\n")
    with pytest.raises(UserError, match=r"bomb\.yaml"):
        build_sam2(tmp_path / "bomb.yaml", image_size=64, num_maskmem=2)


def test_the_packages_configs_are_read_as_hydra_reads_them():
    from omegaconf import OmegaConf

    for name, path in pretrained._package_configs().items():
        if "training" not in name:
            assert OmegaConf.load(path) == OmegaConf.create(load_yaml(path)), name
