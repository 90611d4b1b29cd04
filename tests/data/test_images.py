"""Images: channels are moved first, folders become rows, and figures draw both grey levels and colours."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.data import load, stream
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.plots._style import draw_image

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
GREYS = COLOURS[..., :1]


def test_bytes_with_channels_last_become_rows_with_channels_first(tmp_path):
    np.save(tmp_path / "a.npy", COLOURS)
    for source in (COLOURS, torch.tensor(COLOURS), tmp_path / "a.npy"):
        data = load(source)
        assert data.image_shape == (3, 5, 4)
        for channel in range(3):
            np.testing.assert_array_equal(data.x.reshape(6, 3, 5, 4)[:, channel].numpy(), COLOURS[..., channel])
        assert "channels moved from last to first" in data.summary


def test_grey_images_have_a_height_and_a_width():
    for images in (GREYS, GREYS[..., 0], np.moveaxis(GREYS, -1, 1), np.moveaxis(GREYS, -1, 1) / 255):
        data = load(images)
        assert data.image_shape == (5, 4)
        np.testing.assert_array_equal(data.x.numpy(), images.reshape(6, 20).astype(np.float32))


@pytest.mark.parametrize("images", [np.moveaxis(COLOURS, -1, 1), np.moveaxis(COLOURS, -1, 1) / 255])
def test_channels_that_are_first_stay_there(images):
    data = load(images)
    assert data.image_shape == (3, 5, 4)
    np.testing.assert_array_equal(data.x.numpy(), images.reshape(6, 60).astype(np.float32))
    assert "channels" not in data.summary


def test_other_arrays_are_flattened_as_they_are():
    for array in (COLOURS / 255, COLOURS[..., :2], COLOURS[None]):
        data = load(array)
        assert data.image_shape is None
        np.testing.assert_array_equal(data.x.numpy(), array.reshape(len(array), -1).astype(np.float32))


def test_a_stream_has_the_rows_that_loading_gives(tmp_path):
    np.save(tmp_path / "a.npy", COLOURS)
    for source in (COLOURS, tmp_path / "a.npy"):
        streamed = stream(source)
        assert streamed.image_shape == (3, 5, 4)
        assert torch.equal(streamed.sample(6).x, load(COLOURS).x)


def test_a_convolution_takes_the_rows():
    net = pv.nn.conv_encoder(load(COLOURS).image_shape, [4], 2)
    assert net(load(COLOURS).x).shape == (6, 2)


# --- Folders ---


def write(folder, **images: np.ndarray):
    for name, image in images.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def test_a_folder_of_images_becomes_rows_with_labels(tmp_path):
    folder = write(tmp_path, dog__1_png=COLOURS[0], cat__2_png=COLOURS[1], dog__3_bmp=COLOURS[2])
    (folder / "cat" / "._2.png").write_bytes(b"of the Finder")
    (folder / "notes.txt").write_text("no image")
    data = load(folder)
    assert data.row_labels.tolist() == ["cat/2.png", "dog/1.png", "dog/3.bmp"]
    assert (data.labels.tolist(), data.label_names) == ([0, 1, 1], ["cat", "dog"])
    assert data.image_shape == (3, 5, 4)
    expected = np.moveaxis(COLOURS[[1, 0, 2]], -1, 1).reshape(3, 60).astype(np.float32) / 255
    np.testing.assert_array_equal(data.x.numpy(), expected)
    assert "labels from 2 subfolders" in data.summary
    assert load(str(folder)).rows(torch.tensor([2])).row_labels.tolist() == ["dog/3.bmp"]


def test_a_folder_of_grey_images_without_labels(tmp_path):
    data = load(write(tmp_path, b_png=GREYS[0, ..., 0], a_png=GREYS[1, ..., 0]))
    assert (data.labels, data.image_shape) == (None, (5, 4))
    np.testing.assert_array_equal(data.x.numpy(), GREYS[[1, 0]].reshape(2, 20).astype(np.float32) / 255)


def test_grey_images_among_colours_become_colours(tmp_path):
    data = load(write(tmp_path, a_png=COLOURS[0], b_png=GREYS[1, ..., 0]))
    assert "1 grey images converted to colours" in data.summary
    for channel in data.x[1].reshape(3, 20):
        np.testing.assert_array_equal(channel.numpy(), GREYS[1].ravel().astype(np.float32) / 255)


def test_parts_of_images_that_are_left_out_are_noted(tmp_path):
    write(tmp_path, a__1_png=COLOURS[0])
    Image.fromarray(np.dstack([COLOURS[1], GREYS[1]])).save(tmp_path / "a" / "2.png")
    turned = Image.fromarray(COLOURS[2])
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "a" / "3.jpg", exif=exif)
    (tmp_path / "a" / "4.jp2").write_bytes(b"of another type")
    write(tmp_path / "a", x__5_png=COLOURS[3])
    summary = load(tmp_path).summary
    for note in ("1 alpha channels left out", "1 EXIF orientations ignored", "2 other files and folders left out"):
        assert note in summary
    assert load(tmp_path).x.shape == (3, 60)


def postscript(path):
    text = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n({path}) (w) file closefile\n%%EOF\n"
    path.with_suffix(".png").write_text(text)


def frames(suffix):
    first, *rest = (Image.new("L", (8, 8), 50 * i) for i in range(3))
    return lambda f: first.save(f / f"a.{suffix}", save_all=True, append_images=rest)


def png48(folder):
    """A colour image with 16 bits per channel, of which Pillow reads 8."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ]
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


@pytest.mark.parametrize("kind", ["ICO", "DDS", "TGA", "JPEG2000", "PCX"])
def test_formats_of_other_suffixes_are_refused(kind, tmp_path):
    """Pillow chooses the format by content: a PostScript file named a.png would start Ghostscript."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", kind)
    with pytest.raises(DataError, match=r"a\.png: not a valid image"):
        load(tmp_path)


def test_postscript_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    postscript(tmp_path / "a")
    with pytest.raises(DataError, match=r"a\.png: not a valid image"):
        load(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, struct.error, SyntaxError, IndexError])
def test_any_error_on_content_is_one_sentence(error, tmp_path, monkeypatch):
    def load_pixels(self):
        raise error("one\ntwo")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load_pixels)
    with pytest.raises(DataError, match=r"a\.png: not a valid image \(one two\); copy or make it again"):
        load(write(tmp_path, a_png=COLOURS[0]))


def test_a_jpeg_image_of_very_many_scans_is_refused_before_it_is_decoded(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((2000, 2000), np.uint8)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    scan = b"\xff\xda" + whole.split(b"\xff\xda")[-3]
    (tmp_path / "a.jpg").write_bytes(whole[:-2] + scan * 3_000 + whole[-2:])  # 45 KB, decoded in 10 s
    with pytest.raises(DataError, match=r"have 3,006 scans on average, more than 100, and would take minutes"):
        load(tmp_path)
    (tmp_path / "a.jpg").write_bytes(whole[:-2] + scan * 5 + whole[-2:])
    assert load(tmp_path).x.count_nonzero() == 0


def test_tiles_of_a_tiff_image_are_measured(tmp_path):
    """A tile is decoded whole, however small the image."""
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 2**15, 323: 2**15, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<IQH", 16, 0, len(tags)) + entries + bytes(4))
    with pytest.raises(DataError, match=r"unpacks from .* to 12 GiB"):
        load(tmp_path)


def damaged(folder):
    write(folder, a_png=COLOURS[0])
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:-30])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write(f, a_png=COLOURS[0], b_png=COLOURS[1, :3]), "a.png has 4 × 5 pixels and b.png 4 × 3; make"),
        (lambda f: write(f, a_png=COLOURS[0], cat__b_png=COLOURS[1]), "a.png is in no subfolder, but other images are"),
        (lambda f: write(f, a_png=np.zeros((5, 4), np.uint16)), "a.png: the pixels have Pillow's mode I;16"),
        (png48, "a.png: the pixels have 16 bits per channel"),
        (
            lambda f: (f / "a.ppm").write_bytes(b"P6 4 4 65535\n" + bytes(96)),
            "a.ppm: the pixels have 16 bits per channel",
        ),
        (frames("gif"), "a.gif: has more than one frame or page; save each as an image of its own"),
        (frames("tif"), "a.tif: has more than one frame"),
        (frames("webp"), "a.webp: has more than one frame"),
        (damaged, "b.png: not a valid image"),
        (lambda f: (f / "a.png").write_text("none"), "a.png: not a valid image"),
        (lambda f: (f / "a.csv").write_text("a\n1\n"), "the folder contains neither MNIST's train-images.* nor images"),
    ],
)
def test_other_folders_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_has_no_columns(tmp_path):
    with pytest.raises(SettingsError, match="label does not apply"):
        load(write(tmp_path, a_png=COLOURS[0]), label="kind")


# --- Figures ---


def drawn(row, image_shape, limits=(0.0, 255.0)) -> np.ndarray:
    axes = Figure().subplots()
    draw_image(axes, row, image_shape, limits)
    return np.asarray(axes.images[0].get_array())


def test_colours_are_drawn_as_they_were():
    np.testing.assert_allclose(drawn(load(COLOURS).x[0].numpy(), (3, 5, 4)), COLOURS[0] / 255, rtol=1e-6)
    assert (drawn(np.full(60, 300.0), (3, 5, 4)) == 1).all()
    assert (drawn(np.zeros(60), (3, 5, 4), (0.0, 0.0)) == 0).all(), "images of one colour"
    for shape in ((5, 4), (1, 5, 4)):
        np.testing.assert_array_equal(drawn(GREYS[0].ravel(), shape), GREYS[0, ..., 0])


def test_a_run_on_a_folder_of_images_draws_them(tmp_path, capsys):
    folder = tmp_path / "images"
    names = [f"{'cat' if i % 2 else 'dog'}__{i}_png" for i in range(24)]
    write(folder, **{name: COLOURS[i % 6] // (1 + i // 6) for i, name in enumerate(names)})
    quick = ("--epochs", "1", "--hidden", "[4]", "--latent_dim", "2", "--engine", "eager", "--device", "cpu")
    assert main(["fit", "--data", str(folder), "--out", str(tmp_path / "run"), *quick]) == 0
    assert f"{folder}: read 24 rows, 60 columns; labels from 2 subfolders" in capsys.readouterr().out
    assert (tmp_path / "run" / "reconstructions.png").is_file()
    assert (tmp_path / "run" / "held_out_rows.txt").read_text().splitlines()[1].endswith(".png")
