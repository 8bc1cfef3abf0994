"""Data of the command line: how files become calls, what is said of it, and what is refused."""

import os

import click
import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import quant2e
from quant2e.cli.inputs.arguments import DataSource
from quant2e.cli.inputs.data import read_data
from quant2e.cli.inputs.images import Preprocessing
from quant2e.cli.inputs.taken import Taken
from quant2e.errors import CalibrationError, FileFormatError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import capture
from quantizers import XNNPACKQuantizer

NO_IMAGES = Preprocessing()


class TwoInputs(nn.Module):
    def forward(self, ids, mask):
        return ids * mask


def taken(model, *example, varying=None):
    shapes = None if varying is None else tuple({0: varying} for _ in example)
    return Taken(capture(model, example, dynamic_shapes=shapes), Call(example, {}))


def images_of(size=(4, 6), dtype=torch.float32, batch=2):
    return taken(nn.Identity(), torch.zeros(batch, 3, *size, dtype=dtype))


def tensors(batches):
    return [[*call.args, *call.kwargs.values()] for call in batches]


def test_arrays_are_cut_into_batches_of_the_models_size(tmp_path):
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    np.savez(tmp_path / "x.npz", x)
    batches = read_data(tmp_path / "x.npz", taken(nn.Identity(), torch.zeros(3, 2)), None, NO_IMAGES)
    assert len(batches) == 2
    assert [call.tolist() for (call,) in tensors(batches)] == [x[:3].tolist(), x[3:6].tolist()]
    assert tensors(batches) is not None  # read again
    assert batches.notes[0] == "7 samples, 2 batches of 3; the last 1 are left out"


@pytest.mark.parametrize(("asked", "sizes"), [(None, [8] * 8), (30, [30, 30]), (16, [16] * 4)])
def test_a_batch_that_varies_has_as_many_samples_as_asked_or_as_make_several(tmp_path, asked, sizes):
    np.savez(tmp_path / "x.npz", input=np.zeros((64, 2), np.float32))
    model = taken(nn.Identity(), torch.zeros(2, 2), varying=Dim("n", min=1, max=32))
    batches = read_data(tmp_path / "x.npz", model, asked, NO_IMAGES)
    assert [len(x) for (x,) in tensors(batches)] == sizes


def test_arrays_go_to_inputs_by_name_and_extra_ones_are_left_out(tmp_path):
    ids, mask = np.full((4, 2), 3), np.full((4, 2), 2, np.int32)
    np.savez(tmp_path / "x.npz", labels=np.zeros(4), mask=mask, ids=ids)
    model = taken(TwoInputs(), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))
    batches = read_data(tmp_path / "x.npz", model, None, NO_IMAGES)
    first, *_ = tensors(batches)
    assert [x.unique().tolist() for x in first] == [[3], [2]]
    assert [x.dtype for x in first] == [torch.int64, torch.int64]
    assert set(batches.notes[1:]) == {"left out, as the model does not take them: labels", "mask: int32 → int64"}


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    x = torch.arange(8, dtype=torch.float32).reshape(4, 2)
    save_file({"input": x}, tmp_path / "x.safetensors")
    batches = read_data(tmp_path / "x.safetensors", taken(nn.Identity(), torch.zeros(2, 2)), None, NO_IMAGES)
    assert torch.equal(torch.cat([call for (call,) in tensors(batches)]), x)


def test_folders_of_arrays(tmp_path):
    model = taken(nn.Identity(), torch.zeros(2, 3))
    for index in range(5):
        np.save(tmp_path / f"{index}.npy", np.full(3, index, np.float32))
    batches = read_data(tmp_path, model, None, NO_IMAGES)
    assert [call[:, 0].tolist() for (call,) in tensors(batches)] == [[0, 1], [2, 3]]
    calls = tmp_path / "calls"
    calls.mkdir()
    for index in range(3):
        np.savez(calls / f"{index}.npz", mask=np.full((2, 3), index), ids=np.ones((2, 3), np.int64))
    two = taken(TwoInputs(), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))
    assert [int(mask[0, 0]) for _, mask in tensors(read_data(calls, two, None, NO_IMAGES))] == [0, 1, 2]
    whole = tmp_path / "whole"
    whole.mkdir()
    np.save(whole / "a.npy", np.zeros((2, 3), np.float32))
    assert [tuple(x.shape) for (x,) in tensors(read_data(whole, model, None, NO_IMAGES))] == [(2, 3)]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": np.zeros((4, 3), np.float32)}, r"is \[4, 3\], and the model takes samples × 'input': float32\[2, 2\]"),
        ({"a": np.zeros((4, 2), np.uint8)}, "is uint8, and the model takes float32"),
        ({"a": np.zeros((4, 2)), "b": np.zeros(4)}, "holds a, b, and the model takes 'input': float32"),
        ({"input": np.zeros((1, 2), np.float32)}, r"holds 1 sample\(s\), and the model takes 2 at a time"),
        ({"input": np.zeros((), np.float32)}, "the first axis of every array counts the samples"),
        ({"input": np.zeros((0, 2), np.float32)}, "holds no sample"),
    ],
)
def test_arrays_that_the_model_does_not_take(tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(CalibrationError, match=said):
        read_data(tmp_path / "x.npz", taken(nn.Identity(), torch.zeros(2, 2)), None, NO_IMAGES)


def test_an_array_is_never_given_to_another_input_than_that_of_its_name(tmp_path):
    model = taken(TwoInputs(), torch.zeros(2, 3), torch.zeros(2, 3))
    np.savez(tmp_path / "x.npz", mask=np.ones((4, 3), np.float32), tokens=np.zeros((4, 3), np.float32))
    with pytest.raises(CalibrationError, match="holds mask, tokens, and the model takes 'ids'.*: no array for ids"):
        read_data(tmp_path / "x.npz", model, None, NO_IMAGES)


def test_other_refusals(tmp_path):
    model = taken(nn.Identity(), torch.zeros(2, 2))
    np.savez(tmp_path / "x.npz", np.zeros((4, 2), np.float32))
    with pytest.raises(CalibrationError, match="its batch is fixed, and --batch-size is not 3"):
        read_data(tmp_path / "x.npz", model, 3, NO_IMAGES)
    with pytest.raises(CalibrationError, match="--image-size, --mean … are of images"):
        read_data(tmp_path / "x.npz", model, None, Preprocessing(mean=(0.5,)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="holds no image, .npy or .npz file"):
        read_data(tmp_path / "empty", model, None, NO_IMAGES)
    np.save(tmp_path / "x.npy", np.zeros(2, np.float32))
    with pytest.raises(CalibrationError, match=r"files of several kinds \(npy, npz\)"):
        read_data(tmp_path, model, None, NO_IMAGES)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(FileFormatError, match="is no .safetensors file, or was cut off"):
        read_data(tmp_path / "x.safetensors", model, None, NO_IMAGES)


# ------------------------------------------------------------------------------------------------------------ images


@pytest.fixture
def pictures(tmp_path):
    """Four images of 8 × 12: the left half red of 200, the right half green of 100."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, :6, 0], pixels[:, 6:, 1] = 200, 100
    for index in range(4):
        image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return tmp_path


def test_images_are_resized_scaled_and_normalised_as_stated(pictures):
    batches = read_data(pictures, images_of(), None, Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5,)))
    (first,), *others = tensors(batches)
    assert len(others) == 1
    assert first.shape == (2, 3, 4, 6)
    torch.testing.assert_close(first[0, :, 0, 0], torch.tensor([200 / 255 - 0.5, -0.25, 0.0]) / 0.5)
    assert batches.notes[1] == (
        "images: RGB, whole image resized to 4x6 (bilinear), values 0 to 1, mean 0.5,0.25,0, std 0.5"
    )


def test_what_is_not_stated_is_said(pictures):
    batches = read_data(pictures, images_of(), None, NO_IMAGES)
    assert batches.notes[1].endswith(
        "mean 0, std 1; state yours with --mean and --std if the model was trained with others"
    )


def test_the_centre_is_cut_out(pictures):
    batches = read_data(pictures, images_of((4, 4)), None, Preprocessing(resize=4))
    (first,), *_ = tensors(batches)
    assert first.shape == (2, 3, 4, 4)
    assert float(first[0, 0, 0, 0]) > 0.7
    assert float(first[0, 1, 0, 3]) > 0.3
    assert "shorter side resized to 4, centre 4x4 cut out" in batches.notes[1]


def test_other_layouts_and_integers(pictures):
    (first,), *_ = tensors(read_data(pictures, images_of(dtype=torch.uint8), None, NO_IMAGES))
    assert first.dtype is torch.uint8
    assert int(first[0, 0, 0, 0]) == 200
    last = taken(nn.Identity(), torch.zeros(2, 4, 6, 3))
    (first,), *_ = tensors(read_data(pictures, last, None, NO_IMAGES))
    assert first.shape == (2, 4, 6, 3)
    grey = taken(nn.Identity(), torch.zeros(1, 1, 4, 6))
    assert len(read_data(pictures, grey, None, NO_IMAGES)) == 4


@pytest.mark.parametrize(
    ("model", "asked", "said"),
    [
        ((2, 3, 4), NO_IMAGES, "images are inputs of four axes"),
        ((2, 3, 4, 3), NO_IMAGES, "neither axis, or both, could be the 1 or 3 channels"),
        ((2, 3, 4, 6), Preprocessing(size=(5, 5)), "--image-size 5x5: the model takes"),
        ((2, 3, 4, 6), Preprocessing(mean=(0.5, 0.5)), r"--mean has 2 numbers, and images here have 3 channel\(s\)"),
        ((2, 3, 4, 6), Preprocessing(resize=5), "--resize 5: 4x6 cannot be cut out of less"),
    ],
)
def test_what_is_not_clear_of_images_is_refused(pictures, model, asked, said):
    with pytest.raises(CalibrationError, match=said):
        read_data(pictures, taken(nn.Identity(), torch.zeros(model)), None, asked)


def test_a_file_that_is_no_image_is_named(pictures):
    (pictures / "0.png").write_bytes(b"no image")
    with pytest.raises(FileFormatError, match="0.png cannot be read as an image"):
        list(read_data(pictures, images_of(), None, NO_IMAGES))


def folder_of(folder, **images):
    """A folder of images, by the names of their files; bytes are written as they are."""
    folder.mkdir()
    for name, image in images.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(image) if isinstance(image, bytes) else image.save(path)
    return folder


def picture(mode="RGB", size=(6, 4), value=200):
    """One colour, red where there are colours."""
    image = pytest.importorskip("PIL.Image")
    red = image.new("RGB", size, (value, 0, 0))
    if mode.startswith(("I", "F")):
        return image.fromarray(np.full(size[::-1], 40_000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    return red.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "red", "said"),
    [
        ("RGB", "png", [200, 0, 0], None),
        ("P", "png", [204, 0, 0], None),  # the nearest colour of the palette
        ("RGBA", "png", [200, 0, 0], "of 2 image(s) transparency is left out"),
        ("LA", "png", [60, 60, 60], "of 2 image(s) transparency is left out"),
        ("L", "png", [60, 60, 60], None),
        ("1", "png", [0, 0, 0], None),
        ("CMYK", "tif", [200, 0, 0], None),
    ],
)
def test_images_of_other_modes(tmp_path, mode, suffix, red, said):
    image = picture(mode) if mode != "1" else picture("RGB", value=20).convert("1")
    folder = folder_of(tmp_path / "images", **{f"a__{suffix}": image, f"b__{suffix}": image})
    batches = read_data(folder, images_of(dtype=torch.uint8), None, NO_IMAGES)
    (first,), *_ = tensors(batches)
    assert first[0, :, 0, 0].tolist() == red
    assert [note for note in batches.notes if note.startswith("of ")] == ([said] if said else [])


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I", "tif"), ("F", "tif")])
def test_images_whose_values_pillow_would_cut_off_are_refused(tmp_path, mode, suffix):
    folder = folder_of(tmp_path / "images", **{f"a__{suffix}": picture(), f"b__{suffix}": picture(mode)})
    with pytest.raises(FileFormatError, match=rf"b.{suffix} is an image of mode {mode}, of more than 8 bits a value"):
        read_data(folder, images_of(), None, NO_IMAGES)


def test_of_several_frames_the_first_is_taken_and_that_is_said(tmp_path):
    first, second = picture(value=200), picture(value=10)
    folder = folder_of(tmp_path / "images", one__tif=first)
    first.save(folder / "pages.tif", save_all=True, append_images=[second])
    batches = read_data(folder, images_of(dtype=torch.uint8), None, NO_IMAGES)
    (taken_first,), *_ = tensors(batches)
    assert taken_first[:, 0].unique().tolist() == [200]
    assert "of 1 image(s) the first of several frames or pages is taken" in batches.notes


def test_sizes_may_differ(tmp_path):
    folder = folder_of(tmp_path / "images", a__png=picture(size=(30, 2)), b__png=picture(size=(5, 50)))
    (first,), *_ = tensors(read_data(folder, images_of(dtype=torch.uint8), None, NO_IMAGES))
    assert (first.shape, first[:, 0].unique().tolist()) == ((2, 3, 4, 6), [200])


@pytest.mark.parametrize("broken", [b"", b"\x89PNG broken", b"text"])
def test_a_broken_image_is_told_before_anything_runs(tmp_path, broken):
    folder = folder_of(tmp_path / "images", a__png=picture(), b__png=picture(), z__png=broken)
    with pytest.raises(FileFormatError, match="z.png cannot be read as an image: no image, or one of a format"):
        read_data(folder, images_of(), None, NO_IMAGES)


def test_what_systems_leave_in_folders_is_left_out_and_said(tmp_path):
    folder = folder_of(
        tmp_path / "images",
        a__png=picture(),
        b__PNG=picture(),
        __hidden__png=b"",
        labels__csv=b"",
        Thumbs__db=b"",
    )
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX/._a.png").write_bytes(b"")
    (folder / "again").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    batches = read_data(folder, images_of(), None, NO_IMAGES)
    assert batches.notes[:2] == (
        "2 samples, 1 batches of 2",
        "left out: 3 (hidden), 1 (folders that are links), 1 (no files, or links to nothing), 1 (.csv)",
    )


def test_files_of_one_folder_hold_arrays_of_the_same_names(tmp_path):
    """Each file by itself would be taken: one by name, the other in the order of its arrays."""
    np.savez(tmp_path / "a.npz", input=np.zeros((2, 2), np.float32))
    np.savez(tmp_path / "b.npz", other=np.zeros((2, 2), np.float32))
    batches = read_data(tmp_path, taken(nn.Identity(), torch.zeros(2, 2)), None, NO_IMAGES)
    with pytest.raises(CalibrationError, match="b.npz holds other, and .*a.npz holds input"):
        list(batches)


@pytest.mark.parametrize("name", ["pipe.npz", "pipe.safetensors", "zero.npz", "zero.safetensors"])
def test_pipes_and_devices_are_no_data(tmp_path, name):
    """One blocks for ever where it is opened, the other never ends."""
    path = tmp_path / name
    path.symlink_to("/dev/zero") if "zero" in name else os.mkfifo(path)
    with pytest.raises(click.BadParameter, match="is no file and no folder, but a device or a pipe"):
        DataSource().convert(path, None, None)


def test_an_input_that_never_changes_is_noted(tmp_path):
    model = nn.Linear(4, 4)
    quantizer = XNNPACKQuantizer().set_global("w8a8")
    noted = "the input 'input' was 0 throughout the calibration data: its range says nothing of other values"
    for data, said in ([torch.zeros(8, 4)] * 5, True), ([torch.zeros(8, 4), torch.ones(8, 4), torch.ones(8, 4)], False):
        report = quant2e.quantize(model, (data[0],), quantizer, data, min_sqnr_db=None).report
        assert (noted in report.notes) is said
