"""Decoding of every kind of picture, the crop rule, and the resize against Pillow's."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.hashing import uniform_stream
from isthmus.data_pipeline.sample.image_formats import picture_extension
from isthmus.data_pipeline.sample.images import decode_image, random_resized_crop_box, resize_square

pytestmark = pytest.mark.unit
NAN = float("nan")


def smooth_image(height=48, width=64):
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    channels = [127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 7), 127 + 120 * np.sin((x + y) / 11)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encode(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def test_a_jpeg_is_decoded_as_pillow_decodes_it():
    data = encode(Image.fromarray(smooth_image()), "JPEG", quality=95)
    assert np.array_equal(decode_image(data, 10**6), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_keep_their_pixels(file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(Image.fromarray(smooth_image()), file_format, **options)
    assert np.array_equal(decode_image(data, 10**6), smooth_image())


def test_cmyk_jpeg():
    data = encode(Image.fromarray(smooth_image()).convert("CMYK"), "JPEG", quality=98)
    assert np.abs(decode_image(data, 10**6).astype(int) - smooth_image()).mean() < 3


def test_grey_jpeg_has_three_channels():
    decoded = decode_image(encode(Image.fromarray(smooth_image()[..., 0]), "JPEG", quality=98), 10**6)
    assert decoded.shape == (48, 64, 3)
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_palette_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 0)
    decoded = decode_image(encode(image, "PNG", transparency=0), 10**6)
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[1, 1].tolist() == [255, 0, 0]


def test_alpha_lies_on_white():
    decoded = decode_image(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), 10**6)
    assert (decoded == 255).all()
    half = decode_image(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128))), 10**6)
    assert (np.abs(half.astype(int) - 127) <= 1).all()


def test_sixteen_bits_keep_the_high_byte():
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    decoded = decode_image(encode(Image.fromarray(ramp)), 10**6)
    assert np.array_equal(decoded[..., 1], (ramp >> 8).astype(np.uint8))


def png(bits, colour, row, transparent):
    """A PNG of eight equal rows with a transparent colour, which Pillow cannot write for 16 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, bits, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 8)
    parts = chunk(b"IHDR", header), chunk(b"tRNS", transparent), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(8, 0, bytes([0] * 4 + [156] * 4), bytes(2)), [255] * 4 + [156] * 4),
        (png(16, 0, struct.pack(">8H", *[0] * 4, *[40000] * 4), bytes(2)), [255] * 4 + [156] * 4),
        (png(16, 0, struct.pack(">8H", *[777] * 4, *[778] * 4), struct.pack(">H", 777)), [255] * 4 + [3] * 4),
        (
            png(
                16, 2, struct.pack(">24H", *[1000, 2000, 3000] * 4, *[40000] * 12), struct.pack(">3H", 1000, 2000, 3000)
            ),
            [255] * 4 + [156] * 4,
        ),
    ],
    ids=["grey 8", "grey 16", "grey 16, a neighbouring value", "rgb 16"],
)
def test_a_transparent_colour_lies_on_white(data, expected):
    assert decode_image(data, 10**6)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 0.5, 1], [0, 128, 255]), ([-5, 60.4, 300], [0, 60, 255]), ([0, NAN, 1], [0, 0, 255])],
)
def test_float_tiff(values, expected):
    image = Image.fromarray(np.tile(np.array(values, dtype=np.float32), (3, 1)))
    assert decode_image(encode(image, "TIFF"), 10**6)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("where", ["after long segments", "in XMP"])
def test_the_orientation_is_found_wherever_it_lies(where):
    image, exif = Image.fromarray(smooth_image()), Image.Exif()
    exif[0x0112] = 6
    if where == "in XMP":
        data = encode(image, "JPEG", quality=98, xmp=b'<rdf:Description tiff:Orientation="6"/>')
    else:
        data = encode(image, "JPEG", quality=98, exif=exif)
        comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
        data = data[:2] + comment + data[2:]
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.size == (48, 64)
    assert np.array_equal(decode_image(data, 10**6), np.asarray(expected))


def test_the_first_picture_of_a_multi_picture_jpeg():
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    decoded = decode_image(encode(frames[0], "MPO", save_all=True, append_images=frames[1:]), 10**6)
    assert np.abs(decoded[0, 0].astype(int) - [255, 0, 0]).max() <= 2


def test_the_picture_is_chosen_by_its_extension_not_by_its_place():
    assert picture_extension(["png", "jpg", "txt"]) == picture_extension(["txt", "jpg", "png"]) == "jpg"
    assert picture_extension(["seg.png", "webp"]) == "webp"
    assert picture_extension(["txt", "npy"]) is None


def test_only_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    decoded = decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), 10**6)
    assert decoded[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_rotation_is_honoured(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if file_format == "JPEG" else {}
    decoded = decode_image(encode(Image.fromarray(smooth_image()), file_format, exif=exif, **options), 10**6)
    upright = np.rot90(smooth_image(), {1: 0, 3: 2, 6: 3, 8: 1}[orientation])
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 2


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "undecodable_image"),
        (b"not an image at all", "undecodable_image"),
        (encode(Image.fromarray(smooth_image()), "JPEG")[:900], "undecodable_image"),
        (encode(Image.fromarray(smooth_image()), "PNG")[:300], "undecodable_image"),
        (b"\xff\xd8\xff" + bytes(100), "undecodable_image"),
        (encode(Image.new("RGB", (1, 1)), "PNG"), "image_too_small"),
        (encode(Image.new("RGB", (1, 1)), "JPEG"), "image_too_small"),
        (encode(Image.new("1", (2000, 2000)), "PNG"), "too_many_pixels"),
        (encode(Image.new("L", (2000, 2000)), "JPEG"), "too_many_pixels"),
        (encode(Image.new("1", (20_000, 20_000)), "PNG"), "too_many_pixels"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "jpeg magic", "1x1 png", "1x1 jpeg", "bomb png", "bomb jpeg", "huge"],
)
def test_unusable_images_are_bad_samples(data, cause):
    with pytest.raises(BadSample) as caught:
        decode_image(data, 10**6)
    assert caught.value.cause == cause


def test_the_crop_follows_the_rule():
    scale, height, width = (0.5, 1.0), 300, 400
    boxes = [random_resized_crop_box(height, width, scale, uniform_stream(i)) for i in range(2000)]
    areas = np.array([h * w / (height * width) for _, _, h, w in boxes])
    aspects = np.array([w / h for _, _, h, w in boxes])
    assert all(top >= 0 and top + h <= height and left >= 0 and left + w <= width for top, left, h, w in boxes)
    assert areas.min() > 0.49
    assert areas.max() <= 1.0
    assert aspects.min() > 0.74
    assert aspects.max() < 1.35
    assert abs(np.median([top / (height - h) for top, _, h, _ in boxes if h < height]) - 0.5) < 0.06
    assert boxes[:10] == [random_resized_crop_box(height, width, scale, uniform_stream(i)) for i in range(10)]


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (2, 2)])
def test_extreme_shapes_fall_back_to_the_centre(height, width):
    top, left, h, w = random_resized_crop_box(height, width, (0.9, 1.0), uniform_stream(0))
    assert 0 < h <= height
    assert 0 < w <= width
    assert abs((height - h) // 2 - top) <= h
    assert abs((width - w) // 2 - left) <= w


@pytest.mark.parametrize("size", [24, 224])
def test_the_resize_equals_pillows_antialiased_bicubic(size):
    image = smooth_image(120, 160)
    box = (10, 20, 90, 100)
    crop = Image.fromarray(image[10:100, 20:120])
    expected = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    found = resize_square(image, box, size)
    assert found.shape == (size, size, 3)
    assert np.abs(found.astype(int) - expected).max() <= 2
    assert np.abs(found.astype(int) - expected).mean() < 0.1
