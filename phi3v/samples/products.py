"""A product catalogue drawn with Pillow, in which the picture alone determines the text.

`make_products(out, rows, seed)` writes `out/products.csv` and `out/images/*.jpg`. A picture shows
one product: its silhouette is the category, its fabric the colour and the pattern, and a tag in
the bottom right corner is the size, told by the tag's colour and by its number of dots. Title,
category and price follow from those four, so a model that reads the picture can be exact.

Surprising, and on purpose: a third of the colour, pattern and category combinations are limited
editions, about eight products each, whose column `edition` is the title where that of all others is
their own code. So a split by `edition` holds whole combinations out beside single products, and
asks for titles that training never showed: 61 of 284 rows at seed 1. One picture in eleven is wide
or tall, so that grids of crops other than 2x2 occur.

Row `i` is a pure function of (seed, i): a catalogue of 50 rows is the start of one of 3,000.
Lengths in `u` are pixels of the canvas that a tiny model with four 56-pixel crops sees: 1/112 of
the picture's long side, or 1/168 where the picture is so wide or tall that it has 1x3 crops.
"""

import csv
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as cartesian
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from phi3v.errors import ConfigError
from phi3v.files import write_text
from phi3v.progress import progress

Point = tuple[float, float]
Polygon = list[Point]
Colour = tuple[int, int, int]

HEADER = "product_code,title,category3_code,full_price,currency,imageurl,local_image_path,edition"
COLOURS: dict[str, Colour] = {
    "Navy": (24, 40, 120),
    "Red": (205, 22, 38),
    "Green": (25, 140, 60),
    "Yellow": (240, 205, 40),
    "Purple": (135, 50, 180),
    "Orange": (240, 120, 15),
    "Pink": (255, 85, 170),
    "Brown": (105, 65, 35),
}
PATTERNS = ("plain", "striped", "checked")
BASE_PRICES = {
    "hat": 50,
    "scarf": 70,
    "umbrella": 90,
    "shirt": 110,
    "trousers": 130,
    "dress": 170,
    "boots": 190,
    "bag": 230,
}
SIZE_TENTHS = {"S": 10, "M": 12, "L": 15, "XL": 20}

TAG_COLOURS: dict[str, Colour] = {
    "S": (20, 20, 20),
    "M": (0, 150, 200),
    "L": (215, 0, 150),
    "XL": (110, 180, 0),
}
TAG_DOTS: dict[str, list[Point]] = {
    "S": [(0.5, 0.5)],
    "M": [(0.27, 0.27), (0.73, 0.73)],
    "L": [(0.2, 0.2), (0.5, 0.5), (0.8, 0.8)],
    "XL": [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)],
}
STRIPE_COLOUR: Colour = (190, 190, 190)
DOT_COLOUR: Colour = (255, 255, 255)

CROP_UNITS = 56  # u
STRIPE_UNITS = 16  # u; one 14-pixel patch fits inside a stripe or a check
TAG_UNITS = 28  # u; two patches
TAG_MARGIN_UNITS = 2  # u; also the width of the tag's white edge
SUPERSAMPLING = 2
JPEG_QUALITY = 90
LIMITED_SHARE = 0.18  # of the products


def _arc(centre: Point, radius: Point, degrees: tuple[int, int]) -> Polygon:
    """Sample an elliptic arc, one point each 10 degrees; y points down, so 180..360 is the top."""
    start, stop = degrees
    steps = max(1, abs(stop - start) // 10)
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [
        (centre[0] + radius[0] * math.cos(a), centre[1] + radius[1] * math.sin(a)) for a in angles
    ]


# Silhouettes in a unit box, y down; what a list holds is filled and overlaid.
SILHOUETTES: dict[str, list[Polygon]] = {
    "hat": [
        _arc((0.5, 0.42), (0.3, 0.3), (180, 360)) + [(0.8, 0.75), (0.2, 0.75)],
        _arc((0.5, 0.75), (0.5, 0.12), (0, 360)),
    ],
    "scarf": [
        [(0, 0.68), (0.68, 0), (0.7, 0.14), (0.84, 0.12), (0.84, 0.28), (1, 0.32)]
        + [(0.32, 1), (0.28, 0.84), (0.14, 0.86), (0.14, 0.7)],
    ],
    "umbrella": [
        _arc((0.5, 0.55), (0.5, 0.55), (180, 360))
        + _arc((0.75, 0.55), (0.25, 0.12), (360, 180))
        + _arc((0.25, 0.55), (0.25, 0.12), (360, 180)),
        [(0.46, 0.5), (0.54, 0.5), (0.54, 0.88), (0.46, 0.88)],
        _arc((0.4, 0.86), (0.14, 0.14), (0, 180)) + _arc((0.4, 0.86), (0.06, 0.06), (180, 0)),
    ],
    "shirt": [
        [(0.3, 0), (0.4, 0.1), (0.6, 0.1), (0.7, 0), (1, 0.3), (0.86, 0.5), (0.76, 0.4)]
        + [(0.76, 1), (0.24, 1), (0.24, 0.4), (0.14, 0.5), (0, 0.3)],
    ],
    "trousers": [
        [(0.16, 0), (0.84, 0), (0.98, 1), (0.64, 1), (0.5, 0.3), (0.36, 1), (0.02, 1)],
    ],
    "dress": [
        [(0.3, 0), (0.4, 0), (0.5, 0.14), (0.6, 0), (0.7, 0), (0.7, 0.2), (0.6, 0.4)]
        + [(1, 1), (0, 1), (0.4, 0.4), (0.3, 0.2)],
    ],
    "boots": [
        [(0.45, 0), (0.98, 0), (0.98, 1), (0.7, 1), (0.66, 0.9), (0.58, 1), (0, 1), (0, 0.82)]
        + [(0.14, 0.66), (0.45, 0.58)],
    ],
    "bag": [
        [(0.06, 0.4), (0.94, 0.4), (1, 1), (0, 1)],
        _arc((0.5, 0.42), (0.34, 0.42), (180, 360)) + _arc((0.5, 0.42), (0.22, 0.28), (360, 180)),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """What a title says: one colour, pattern and category."""

    colour: str
    pattern: str
    category: str


@dataclass(frozen=True, kw_only=True)
class Product:
    """One row of the catalogue; its texts follow from its style and size."""

    code: str
    style: Style
    size: str
    is_limited: bool

    @property
    def title(self) -> str:
        """Name the product, for example `Navy striped scarf`."""
        return f"{self.style.colour} {self.style.pattern} {self.style.category}"

    @property
    def edition(self) -> str:
        """What the product shares with others of its limited edition, else its code."""
        return self.title if self.is_limited else self.code

    @property
    def image_path(self) -> str:
        """Give the picture's path relative to the catalogue's folder."""
        return f"images/{self.code}.jpg"


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where a silhouette lies in its picture: centre and extent in pixels, turn in radians."""

    centre: Point
    extent: Point
    turn: float

    def place(self, polygon: Polygon) -> Polygon:
        """Turn and shift points given in pixels from the silhouette's centre."""
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        x0, y0 = self.centre
        return [(x0 + x * cos - y * sin, y0 + x * sin + y * cos) for x, y in polygon]


def full_price(category: str, size: str) -> int:
    """Price a product: the category's base price times 1, 1.2, 1.5 or 2 for S, M, L or XL.

    All 32 prices are whole and differ: a scarf is 70, 84, 105 or 140 USD.
    """
    return BASE_PRICES[category] * SIZE_TENTHS[size] // 10


def limited_editions(seed: int) -> list[Style]:
    """Choose the 64 styles of 192 whose products belong together, in any order.

    Each pair of colour and category has one, in a random pattern, so the 128 other styles still
    show every colour, pattern and category many times over.
    """
    rng = Random(f"{seed} limited editions")
    styles = [
        Style(colour=colour, pattern=rng.choice(PATTERNS), category=category)
        for colour, category in cartesian(COLOURS, BASE_PRICES)
    ]
    rng.shuffle(styles)
    return styles


def list_products(rows: int, seed: int) -> list[Product]:
    """Draw the catalogue's products; row `i` is the same whatever `rows` is."""
    limited = limited_editions(seed)
    styles = [
        Style(colour=colour, pattern=pattern, category=category)
        for colour, pattern, category in cartesian(COLOURS, PATTERNS, BASE_PRICES)
    ]
    common = [style for style in styles if style not in limited]
    products = []
    for index in range(rows):
        rng = Random(f"{seed} product {index}")
        edition = _limited_edition(limited, index, seed)
        style = edition or rng.choice(common)
        size = rng.choice(list(SIZE_TENTHS))
        code = f"P{index + 1:05d}"
        products.append(Product(code=code, style=style, size=size, is_limited=edition is not None))
    return products


def _limited_edition(limited: list[Style], index: int, seed: int) -> Style | None:
    rng = Random(f"{seed} edition {index}")
    return rng.choice(limited) if rng.random() < LIMITED_SHARE else None


def draw_product(product: Product, seed: int) -> Image.Image:
    """Draw a product's picture, 128 to 220 pixels on its long side; about 1 ms on one core.

    Size, shape of the frame, pose, background and brightness are random; what they are for one
    product depends on its code and the seed only.
    """
    rng = Random(f"{seed} picture {product.code}")
    width, height = (SUPERSAMPLING * side for side in _picture_size(rng))
    background = (rng.randint(240, 255), rng.randint(240, 255), rng.randint(240, 255))
    picture = Image.new("RGB", (width, height), background)
    pose = _choose_pose(rng, width, height)
    fabric = _draw_fabric(rng, picture, product.style, pose)
    picture.paste(fabric, mask=_draw_mask(picture, product.style.category, pose))
    _draw_tag(picture, product.size)
    return picture.reduce(SUPERSAMPLING)


def _picture_size(rng: Random) -> tuple[int, int]:
    """Choose width and height in pixels: 91 % of aspect 0.7-1.4, the others wide or tall.

    The HD transform with 4 crops gives 2x2 crops below 2:1, 1x2 below 3:1, and then 1x3.
    """
    long_side = rng.randint(128, 220)
    kind = rng.random()
    if kind < 0.91:
        ratio = rng.uniform(1.0, 1.4)
    elif kind < 0.995:
        ratio = rng.uniform(2.06, 2.3)
    else:
        ratio = rng.uniform(3.1, 3.2)
    short_side = round(long_side / ratio)
    is_wide = rng.random() < 0.5
    return (long_side, short_side) if is_wide else (short_side, long_side)


def _choose_pose(rng: Random, width: int, height: int) -> Pose:
    """Choose where the silhouette lies; in a wide or tall frame, at the end without the tag."""
    box_width = min(width, 1.5 * height)
    box_height = min(height, 1.5 * width)
    scale = rng.uniform(0.8, 0.95)
    x = box_width * (0.5 + rng.uniform(-0.05, 0.05))
    y = box_height * (0.5 + rng.uniform(-0.05, 0.05))
    turn = math.radians(rng.uniform(-5, 5))
    return Pose(centre=(x, y), extent=(scale * box_width, scale * box_height), turn=turn)


def _draw_mask(picture: Image.Image, category: str, pose: Pose) -> Image.Image:
    mask = Image.new("L", picture.size, 0)
    pen = ImageDraw.Draw(mask)
    width, height = pose.extent
    for polygon in SILHOUETTES[category]:
        local = [((x - 0.5) * width, (y - 0.5) * height) for x, y in polygon]
        pen.polygon(pose.place(local), fill=255)
    return mask


def _draw_fabric(rng: Random, picture: Image.Image, style: Style, pose: Pose) -> Image.Image:
    """Fill a picture with the style's colour, up to 10 % brighter or darker, and its pattern."""
    brightness = rng.uniform(0.9, 1.1)
    red, green, blue = (min(255, round(c * brightness)) for c in COLOURS[style.colour])
    fabric = Image.new("RGB", picture.size, (red, green, blue))
    pen = ImageDraw.Draw(fabric)
    side = STRIPE_UNITS * _pixels_per_unit(picture)
    phase = (rng.uniform(0, side), rng.uniform(0, side))
    for left, top, right, bottom in _pattern_boxes(style.pattern):
        xs = (left * side + phase[0], right * side + phase[0])
        ys = (top * side + phase[1], bottom * side + phase[1])
        corners = [(xs[0], ys[0]), (xs[1], ys[0]), (xs[1], ys[1]), (xs[0], ys[1])]
        pen.polygon(pose.place(corners), fill=STRIPE_COLOUR)
    return fabric


def _pattern_boxes(pattern: str) -> Iterator[tuple[int, int, int, int]]:
    """List the grey boxes of a pattern as left, top, right, bottom; unit: one stripe's width.

    Boxes from -5 to 5 stripes around the centre, 160 u long, cover any silhouette.
    """
    if pattern == "striped":
        yield from ((-5, top, 5, top + 1) for top in range(-5, 5, 2))
    if pattern == "checked":
        for top in range(-5, 5):
            yield from ((left, top, left + 1, top + 1) for left in range(-5 + top % 2, 5, 2))


def _draw_tag(picture: Image.Image, size: str) -> None:
    """Draw the size's tag, white-edged, into the bottom right corner."""
    pen = ImageDraw.Draw(picture)
    unit = _pixels_per_unit(picture)
    margin, side = TAG_MARGIN_UNITS * unit, TAG_UNITS * unit
    left, top = picture.width - margin - side, picture.height - margin - side
    edge = (left - margin, top - margin, left + side + margin, top + side + margin)
    pen.rectangle(edge, fill=DOT_COLOUR)
    pen.rectangle((left, top, left + side, top + side), fill=TAG_COLOURS[size])
    radius = 0.15 * side
    for dot_x, dot_y in TAG_DOTS[size]:
        x, y = left + dot_x * side, top + dot_y * side
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=DOT_COLOUR)


def _pixels_per_unit(picture: Image.Image) -> float:
    crops = 2 if max(picture.size) < 3 * min(picture.size) else 3
    return max(picture.size) / (crops * CROP_UNITS)


def make_products(out: Path, rows: int = 3000, seed: int = 0) -> None:
    """Write the catalogue `out/products.csv` and its pictures, replacing one written before.

    The table is written last, so a folder that has it is whole. 3,000 rows take 3 seconds on one
    core and 23 MB of disk.

    Raises: ConfigError if `rows` is below 1 or `out` holds something else than a catalogue.
    """
    if rows < 1:
        raise ConfigError(f"--rows is {rows} for {out}, but a catalogue has 1 or more; try 3000")
    _clear_catalogue(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    products = list_products(rows, seed)
    for product in progress(products, "products", "image", total=rows):
        picture = draw_product(product, seed)
        picture.save(out / product.image_path, quality=JPEG_QUALITY)
    _write_table(out / "products.csv", products)


def sample_texts(rows: int = 500) -> list[str]:
    """What is said of products: texts for a tokenizer that has no catalogue to learn from."""
    return [
        f"What is shown in this image? Product: {row[1]}, Category: {row[2]}, Full Price: {row[3]}"
        for row in map(_table_row, list_products(rows, seed=0))
    ]


def _clear_catalogue(out: Path) -> None:
    """Remove an older catalogue, its table first, or refuse a folder that holds other things."""
    foreign = _find_foreign(out)
    if foreign is not None:
        raise ConfigError(
            f"{out} cannot become a product catalogue because {foreign} is not from one; "
            "name an empty or another folder"
        )
    (out / "products.csv").unlink(missing_ok=True)
    for old in (*out.glob("images/P*.jpg"), *out.glob(".products.csv.*.tmp")):
        old.unlink()


def _find_foreign(out: Path) -> Path | None:
    """Name something in `out` that no catalogue has, or None; an unfinished catalogue is one."""
    if out.exists() and not out.is_dir():
        return out
    table = out / "products.csv"
    if table.exists():
        return None if "https://example.com/products/" in table.read_text("utf-8") else table
    known = re.compile(r"images|images/P\d{5,}\.jpg|\.products\.csv\.\d+\.tmp")
    entries = [*out.glob("*"), *out.glob("images/*")]
    return next((e for e in entries if not known.fullmatch(e.relative_to(out).as_posix())), None)


def _write_table(path: Path, products: list[Product]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(HEADER.split(","))
    writer.writerows(_table_row(product) for product in products)
    write_text(path, table.getvalue())


def _table_row(product: Product) -> list[str]:
    return [
        product.code,
        product.title,
        product.style.category.upper(),
        str(full_price(product.style.category, product.size)),
        "USD",
        f"https://example.com/products/{product.code}.jpg",
        product.image_path,
        product.edition,
    ]
