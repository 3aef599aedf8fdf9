"""The feature cache: the same values cold or warm, for every encoder its own, and nothing wrong."""

import multiprocessing
import os

import numpy as np
import pytest
import torch
from test_model import SIZE, make_clip, make_model

from sam2train.clips import collate_fn
from sam2train.features import FeatureCache, FeaturesConfig
from sam2train.transforms import image_keys

CPU = torch.device("cpu")


def some_maps(seed=0, dtype=torch.float32):
    """The maps of one image, finest first, as an encoder gives them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((4, 8, 8), (8, 4, 4), (16, 2, 2))
    return [torch.randn(1, *size, generator=generator).to(dtype) for size in sizes]


def make_cache(folder, *, encoder="encoder", max_gb=1.0, say=print):
    return FeatureCache(FeaturesConfig(folder=str(folder), max_gb=max_gb), encoder, CPU, say)


def never(place):
    raise AssertionError(f"image {place} is encoded again")


def entries(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_is_encoded_once_and_read_to_the_last_bit(tmp_path, dtype):
    maps = {key: some_maps(seed, dtype) for seed, key in enumerate("abc")}
    calls = []

    def encode(place):
        calls.append(place)
        return maps["abca"[place]]

    cold = make_cache(tmp_path)
    made = cold.maps(["a", "b", "c", "a"], encode)
    assert calls == [0, 1, 2]
    warm = make_cache(tmp_path)
    read = warm.maps(["a", "b", "c", "a"], never)
    for level in range(3):
        expected = torch.cat([maps[key][level] for key in "abca"])
        assert torch.equal(made[level], expected)
        assert torch.equal(read[level], expected)
        assert read[level].dtype == dtype
    assert (cold.num_hits, cold.num_misses) == (0, 3)
    assert (warm.num_hits, warm.num_misses) == (3, 0)


def torn(content):
    return content[: len(content) // 2]


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    "damage", [torn, flipped, lambda _: b"", lambda c: b"\xff" * len(c), lambda _: b"{}"]
)
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    make_cache(tmp_path).maps(["a"], lambda _: some_maps())
    (path,) = entries(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    cache = make_cache(tmp_path)
    made = cache.maps(["a"], lambda _: some_maps())
    assert cache.num_misses == 1
    assert all(map(torch.equal, made, some_maps()))
    assert make_cache(tmp_path).maps(["a"], never)  # and kept whole


def test_encoders_do_not_read_each_other(tmp_path):
    make_cache(tmp_path, encoder="one").maps(["a"], lambda _: some_maps(1))
    (other,) = make_cache(tmp_path, encoder="two").maps(["a"], lambda _: some_maps(2)[:1])
    assert torch.equal(other, some_maps(2)[0])


def test_entries_of_earlier_runs_make_room_those_in_use_stay(tmp_path):
    told = []
    make_cache(tmp_path).maps(["probe"], lambda _: some_maps())
    (path,) = entries(tmp_path)
    entry = path.stat().st_size
    path.unlink()
    budget = 4.5 * entry / 1e9
    make_cache(tmp_path, encoder="before").maps(["a", "b", "c"], lambda i: some_maps(i))
    for age, path in enumerate(entries(tmp_path)):
        os.utime(path, (1000 - age, 1000 - age))
    oldest = [path.stem for path in entries(tmp_path)][-1]
    now = make_cache(tmp_path, max_gb=budget, say=told.append)
    now.maps(["d", "e"], lambda i: some_maps(i))
    left = [path.stem for path in entries(tmp_path)]
    assert oldest not in left
    assert {"d", "e"} < set(left)
    # What this process uses is never dropped; what no longer fits is encoded each time.
    now.maps(["f", "g", "h", "i"], lambda i: some_maps(i))
    assert len(entries(tmp_path)) == 4
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 4.5 * entry
    assert len(told) == 1
    assert "features.max_gb" in told[0]
    assert str(tmp_path) in told[0]
    for key in "de":
        now.maps([key], never)


def test_a_full_disk_costs_the_cache_not_the_run(tmp_path, monkeypatch):
    told = []

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    cache = make_cache(tmp_path, say=told.append)
    for _ in range(2):
        made = cache.maps(["a", "b"], lambda i: some_maps(i))
        assert torch.equal(made[0][1:], some_maps(1)[0])
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert not list(tmp_path.rglob("*.part"))


def _fill(folder, seed):
    order = np.random.default_rng(seed).permutation(40).tolist()
    cache = make_cache(folder)
    made = cache.maps([f"{i:02}" for i in order], lambda place: some_maps(order[place]))
    assert all(torch.equal(made[0][p : p + 1], some_maps(i)[0]) for p, i in enumerate(order))


def test_processes_read_and_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path, seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(entries(tmp_path)) == 40
    _fill(tmp_path, 9)


def test_keys_tell_pixels_and_shape_apart():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    changed = images.copy()
    changed[1, 0, 0, 0] ^= 1
    keys = image_keys(images)
    assert len(set(keys)) == 3
    assert [a == b for a, b in zip(keys, image_keys(changed), strict=True)] == [True, False, True]
    assert image_keys(images.reshape(3, 6, 4, 3))[0] != keys[0]


# -- in the model --------------------------------------------------------------------------------


def keyed(clip):
    """The clip with keys, as `ClipDataset` gives it."""
    pixels = (clip.images.permute(0, 2, 3, 1).numpy() * 40 + 120).clip(0, 255).astype(np.uint8)
    fields = {**vars(clip), "image_keys": image_keys(pixels)}
    return type(clip)(**fields)


def cached_model(folder, trainable=("memory_attention",)):
    model = make_model(trainable)
    model.use_feature_cache(FeaturesConfig(folder=str(folder)))
    return model


@pytest.mark.parametrize("trained", [("memory_attention",), ("memory_attention", "mask_decoder")])
def test_a_cached_step_is_the_same_cold_and_warm_and_near_the_fresh_one(tmp_path, trained):
    """Also where the decoder trains, whose first convolutions then come after the cache."""
    batch = collate_fn([keyed(make_clip(("point", 0), seed=s)) for s in range(2)])

    def gradients(model):
        outputs = model(batch)
        outputs["pred_masks"].square().mean().backward()
        return outputs["pred_masks"].detach(), {
            name: p.grad.clone()
            for name, p in model.trainable_parameters().items()
            if p.grad is not None
        }

    cold_model = cached_model(tmp_path, trained)
    cold = gradients(cold_model)
    warm_model = cached_model(tmp_path, trained)
    warm = gradients(warm_model)
    fresh = gradients(make_model(trained))
    assert cold_model.feature_counts == (0, 6)
    assert warm_model.feature_counts == (6, 6)
    assert torch.equal(cold[0], warm[0])
    assert cold[1].keys() == warm[1].keys() == fresh[1].keys()
    assert all(torch.equal(cold[1][name], warm[1][name]) for name in cold[1])
    # README and the LOG state this bound.
    scale = fresh[0].abs().max()
    assert ((cold[0] - fresh[0]).abs().max() / scale).item() < 1e-5
    if "mask_decoder" in trained:
        assert "sam_mask_decoder.conv_s0.weight" in cold[1]


def test_other_weights_are_another_encoder(tmp_path):
    """Weights that are loaded after the first use: never features of the ones before."""
    clip = keyed(make_clip(("point", 0)))
    model = cached_model(tmp_path)
    before = model.encode_images(clip.images, clip.image_keys).levels[-1]
    other = make_model()
    with torch.no_grad():
        for parameter in other.image_encoder.parameters():
            parameter *= 1.1
    model.sam2.load_state_dict(other.sam2.state_dict())
    after = model.encode_images(clip.images, clip.image_keys).levels[-1]
    assert not torch.allclose(before, after)
    expected = other.encode_images(clip.images).levels[-1]
    assert torch.allclose(after, expected, atol=1e-5)


def test_precisions_do_not_mix(tmp_path):
    clip = keyed(make_clip(("point", 0)))
    model = cached_model(tmp_path)
    exact = model.encode_images(clip.images, clip.image_keys).levels[-1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.encode_images(clip.images, clip.image_keys)
    again = model.encode_images(clip.images, clip.image_keys).levels[-1]
    assert not torch.equal(rounded.levels[-1].float(), exact)
    assert torch.equal(again, exact)


def test_a_trained_encoder_is_never_cached(tmp_path):
    clip = keyed(make_clip(("point", 0)))
    model = cached_model(tmp_path, ("image_encoder",))
    model(collate_fn([clip]))
    assert not model.caches_features
    assert not entries(tmp_path)


def test_an_evaluation_in_inference_mode_leaves_what_training_can_use(tmp_path):
    clip = keyed(make_clip(("point", 0)))
    model = cached_model(tmp_path)
    with torch.inference_mode():
        model(collate_fn([clip]))
    model(collate_fn([clip]))["pred_masks"].mean().backward()
    assert model.feature_counts == (3, 6)


def test_images_without_keys_are_encoded_together(tmp_path):
    clip = make_clip(("point", 0))
    model = cached_model(tmp_path)
    model(collate_fn([clip]))
    assert clip.images.shape[-1] == SIZE
    assert model.feature_counts == (0, 0)
