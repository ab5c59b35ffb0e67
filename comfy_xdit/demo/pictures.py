"""The pictures that the demo's models learn: one coloured shape on a coloured ground, and words for it.

Two styles: plain, and "outlined", which is what the LoRA teaches: the shape gets a thick dark rim and the
ground gets pale stripes.
"""

from __future__ import annotations

import dataclasses
import math
import random
import textwrap

import numpy
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIDE = 128
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "yellow": (246, 213, 70),
    "green": (46, 160, 84),
    "blue": (44, 98, 207),
    "purple": (128, 72, 178),
    "white": (244, 244, 244),
    "black": (34, 34, 40),
}
SIZES = {"small": 0.20, "": 0.28, "large": 0.37}
RIM = (20, 20, 24)
# Drawn larger and shrunk: PIL's polygons have no smooth edges of their own.
OVERSAMPLING = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows.

    size: a key of SIZES. x, y: the shape's centre, 0..1 of the side. turn: in radians.
    """

    shape: str
    colour: str
    ground: str
    size: str
    x: float
    y: float
    turn: float

    @property
    def prompt(self) -> str:
        thing = f"{self.size} {self.colour} {self.shape}".strip()
        return f"{_article(thing)} {thing} on {_article(self.ground)} {self.ground} ground"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def random_scene(chance: random.Random, *, anywhere: bool = False, prompt: str = "") -> Scene:
    """A scene with every choice made by `chance`; shape and ground never share their colour.

    anywhere: the shape may be wherever it fits, not only in the middle. prompt: a scene's, to be kept to.
    """
    colour, ground = chance.sample(list(COLOURS), 2)
    size, shape = chance.choice(list(SIZES)), chance.choice(SHAPES)
    if prompt:
        *words, shape, _, _, ground, _ = prompt.split()
        size, colour = "".join(words[1:-1]), words[-1]
    room = 0.5 - SIZES[size] - 0.04 if anywhere else 0.0
    return Scene(
        shape=shape,
        colour=colour,
        ground=ground,
        size=size,
        x=0.5 + chance.uniform(-room, room),
        y=0.5 + chance.uniform(-room, room),
        turn=chance.uniform(-0.2, 0.2) if anywhere else 0.0,
    )


def draw(scene: Scene, *, outlined: bool = False) -> Image.Image:
    """The scene as an RGB picture of SIDE by SIDE pixels."""
    side = SIDE * OVERSAMPLING
    ground = COLOURS[scene.ground]
    picture = Image.new("RGB", (side, side), ground)
    if outlined:
        pen = ImageDraw.Draw(picture)
        stripe = tuple(part // 2 if sum(ground) > 600 else part // 2 + 127 for part in ground)
        for top in range(0, side, side // 4):
            pen.rectangle((0, top, side, top + side // 8 - 1), fill=stripe)
        picture.paste(RIM, mask=_mask(scene, side, 0.0))
    picture.paste(COLOURS[scene.colour], mask=_mask(scene, side, 0.04 * side if outlined else 0.0))
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def _mask(scene: Scene, side: int, inset: float) -> Image.Image:
    """Where the shape is, drawn in by `inset` pixels on every edge."""
    mask = Image.new("1", (side, side))
    pen = ImageDraw.Draw(mask)
    x, y, radius = scene.x * side, scene.y * side, SIZES[scene.size] * side

    def circle(reach: float, fill: int) -> None:
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)

    if scene.shape in ("circle", "ring"):
        circle(radius - inset, 1)
        if scene.shape == "ring":
            circle(0.5 * radius + inset, 0)
        return mask
    if scene.shape == "cross":
        arm, reach = 0.33 * radius - inset, radius - inset
        outline = [(arm, reach), (arm, arm), (reach, arm)]
        corners = [(a, b) for a, b in outline] + [(b, -a) for a, b in outline]
        corners += [(-a, -b) for a, b in outline] + [(-b, a) for a, b in outline]
        pen.polygon([_turned(a, b, scene.turn, x, y) for a, b in corners], fill=1)
        return mask
    # A regular polygon's edges lie cos(π / corners) closer than its corners; a star's are closer still.
    num, closeness = {"square": (4, 0.707), "triangle": (3, 0.5), "star": (5, 0.45)}[scene.shape]
    reach = radius - inset / closeness
    first = math.pi / 4 if scene.shape == "square" else -math.pi / 2
    points = []
    for corner in range(num):
        angle = first + scene.turn + 2 * math.pi * corner / num
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        if scene.shape == "star":
            angle += math.pi / num
            points.append((x + 0.45 * reach * math.cos(angle), y + 0.45 * reach * math.sin(angle)))
    pen.polygon(points, fill=1)
    return mask


def _turned(a: float, b: float, angle: float, x: float, y: float) -> tuple[float, float]:
    return x + a * math.cos(angle) - b * math.sin(angle), y + a * math.sin(angle) + b * math.cos(angle)


def as_tensor(pictures: list[Image.Image]) -> Tensor:
    """[batch, 3, height, width] in -1..1."""
    pixels = torch.from_numpy(numpy.stack([numpy.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def as_pictures(images: Tensor) -> list[Image.Image]:
    """The other way round: [batch, 3, height, width] in about -1..1."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(picture.cpu().numpy()) for picture in pixels]


def contact_sheet(
    rows: list[list[Image.Image]], labels: list[str], titles: list[str], *, scale: int = 1
) -> Image.Image:
    """One column of pictures for each label, one row for each title."""
    width, height = rows[0][0].width * scale, rows[0][0].height * scale
    left, top = 90, 50
    sheet = Image.new("RGB", (left + len(labels) * (width + 6), top + len(rows) * (height + 6)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        pen.multiline_text((left + column * (width + 6), 4), _wrapped(label, width // 6), fill="black", spacing=1)
    for row, pictures in enumerate(rows):
        pen.multiline_text((4, top + row * (height + 6) + 4), _wrapped(titles[row], 14), fill="black", spacing=1)
        for column, picture in enumerate(pictures):
            larger = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(larger, (left + column * (width + 6), top + row * (height + 6)))
    return sheet


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, max(width, 8)))
