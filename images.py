"""Picture files: checked, turned upright, brought to RGB and to the one size that the model sees.

What is taken and what is refused stands in data.py's docstring. Pillow holds 4 bytes a pixel of a decoded picture, and
decodes all but JPEG whole. MB to check, and to read, one of 30 million pixels: JPEG 2 and 45 (progressive 90 and 115, CMYK 2
and 70), PNG and BMP in RGB 120 and 145 (PNG in RGBA 120 and 260, in grey or 16-bit grey 30 and 170, 60 and 290), GIF 30 and
170, WEBP 460 and 460. At most 8 pictures are checked at once.
"""
import math
import os
import warnings

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no EPS and the like: to decode those, other programs are started
MAX_RATIO = 200  # longer pictures are refused by Qwen's image processor
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF orientation -> what makes it upright
Image.MAX_IMAGE_PIXELS = 100_000_000  # open_image fails from here on; Pillow only warns, and fails from twice that on
warnings.filterwarnings("ignore", module=r"PIL\.")  # such as broken EXIF, for every read of a picture that we take


def final_size(width, height, factor, min_pixels, max_pixels):
    """(width, height) of like shape, multiples of factor, between min_pixels and max_pixels. Qwen2-VL's arithmetic,
    applied until it changes nothing: one pass can leave a long thin picture at a size that the next pass would change.
    ValueError where there is no such size."""
    for _ in range(16):
        if max(width, height) > MAX_RATIO * min(width, height):
            raise ValueError(f"the image is too long and thin, {width}x{height}, at most {MAX_RATIO}:1")
        w, h = round(width / factor) * factor, round(height / factor) * factor
        if w * h > max_pixels:
            shrink = math.sqrt(width * height / max_pixels)
            w, h = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
        elif w * h < min_pixels:
            grow = math.sqrt(min_pixels / (width * height))
            w, h = (math.ceil(side * grow / factor) * factor for side in (width, height))
        if (w, h) == (width, height) and min_pixels <= w * h <= max_pixels:
            return w, h
        width, height = w, h
    raise ValueError(f"the image fits no size between {min_pixels=} and {max_pixels=}, set them further apart")


def orientation(image):
    """How the camera was turned, 1 (upright) to 8, as EXIF counts; 1 where EXIF is missing, broken or says anything else."""
    if image.format == "PNG":
        image.load()  # getexif would, since it may stand behind the pixels; their errors are not to be taken for its own
    try:
        found = image.getexif().get(0x0112)
    except Exception:  # broken EXIF can raise anything, and the picture is sound
        return 1
    return found if found in range(2, 9) else 1


def open_image(path):
    """(PIL image, its pixels not decoded yet but for a PNG's; (width, height) once upright). ValueError where too large."""
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height}, more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels")
    return image, image.size[::-1] if orientation(image) >= 5 else image.size


def check_image(path):
    """(width, height) of the upright picture, all of it decoded once; a str that says what is wrong, if it is."""
    if not os.path.isfile(path):  # also keeps us from waiting on a pipe
        return f"no image {path:.300}"
    try:
        if os.path.getsize(path) == 0:
            return f"image {path} is empty, 0 bytes"
        image, size = open_image(path)
        with image:
            image.draft(None, (1, 1))  # a JPEG is decoded at an eighth of its size, which still reads every byte
            image.load()
        return size
    except UnidentifiedImageError:  # its own words are the path again
        return f"image {path} cannot be read (broken, or no {', '.join(FORMATS)})"
    except Exception as e:  # a decoder can raise anything on a broken file, and the row is reported
        return f"image {path} cannot be read ({' '.join(str(e).split()) or type(e).__name__})"


def read_image(path, factor, min_pixels, max_pixels):
    """The picture upright, in RGB, on white where it is transparent, at its final size."""
    image, size = open_image(path)
    with image:
        width, height = final_size(*size, factor, min_pixels, max_pixels)
        # libjpeg can decode to a half, quarter or eighth, in as much less memory; never below twice the size we need
        scale = 2 * max(width, height) / max(size)
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        if (turned := orientation(image)) in TURNS:  # not ImageOps.exif_transpose: it fails where it cannot write EXIF anew
            image = image.transpose(TURNS[turned])
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255 instead of scaling
            image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
        clear = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
        if image.mode != (mode := "RGBA" if clear else "RGB"):  # convert copies, even where it has nothing to do
            image = image.convert(mode)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if clear:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image
