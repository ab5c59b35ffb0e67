"""Draw the thumbnail of each bundled workflow: `python workflows/thumbnails.py`.

ComfyUI's template browser shows `name.jpg` beside `name.json`. The picture is the graph itself, in the
colours of ComfyUI's dark theme, our nodes outlined. The JPEG's comment holds `digest(workflow)`, so that a
test can tell a thumbnail that no longer shows its workflow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).resolve().parent
widgets = runpy.run_path(str(FOLDER / "prompt.py"))["widgets"]
OBJECT_INFO = FOLDER.parent / "tests" / "data" / "object_info.json"
WIDTH_PX = 960
OVERSAMPLING = 2
QUALITY = 72
MARGIN = 40
"""Free space around the graph, in graph units."""

BACKGROUND = "#1e1e1e"
GROUP = "#2a3036"
BODY, HEADER, FIELD = "#353535", "#333333", "#222222"
TITLE_TEXT, TEXT, MUTED = "#e8e8e8", "#c8c8c8", "#9a9a9a"
OURS = "#6ea8ff"
TITLE_HEIGHT, ROW, SLOT_RADIUS = 30, 24, 6
PARAGRAPHS = ("CLIPTextEncode", "MarkdownNote")
SLOTS = {
    "MODEL": "#b39ddb",
    "CLIP": "#ffd500",
    "VAE": "#ff6e6e",
    "CONDITIONING": "#ffa931",
    "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6",
    "NOISE": "#b0b0b0",
    "GUIDER": "#66ffff",
    "SAMPLER": "#ecb4b4",
    "SIGMAS": "#cdffcd",
    "XDIT_POOL": "#6ea8ff",
}


def digest(workflow: dict[str, Any]) -> str:
    """What the picture depends on, as a hexadecimal number."""
    drawn = [workflow[part] for part in ("nodes", "links", "groups")]
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Canvas:
    """A drawing in graph units: `draw` is in pixels, `scale` pixels a unit, `origin` the graph's corner."""

    draw: ImageDraw.ImageDraw
    scale: float
    origin: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (x - self.origin[0]) * self.scale, (y - self.origin[1]) * self.scale

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        radius: float = 6,
        outline: str | None = None,
    ) -> None:
        self.draw.rounded_rectangle(
            [self.at(x, y), self.at(x + width, y + height)],
            radius * self.scale,
            fill,
            outline,
            round(3 * self.scale),
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        fill: str,
        *,
        anchor: str = "lm",
        width: float | None = None,
    ) -> None:
        """One line, cut to `width` graph units with an ellipsis."""
        font = ImageFont.load_default(size * self.scale)
        if width is not None and font.getlength(text) > width * self.scale:
            while text and font.getlength(text + "...") > width * self.scale:
                text = text[:-1]
            text += "..."
        self.draw.text(self.at(x, y), text, fill, font, anchor)

    def dot(self, x: float, y: float, fill: str) -> None:
        self.draw.circle(self.at(x, y), SLOT_RADIUS * self.scale, fill)

    def length(self, text: str, size: float) -> float:
        """How wide `text` is, in graph units."""
        return ImageFont.load_default(size * self.scale).getlength(text) / self.scale

    def paragraph(self, x: float, y: float, text: str, size: float, fill: str, *, width: float, height: float) -> None:
        """Words broken into lines of `width`, as many as fit `height`."""
        font = ImageFont.load_default(size * self.scale)
        lines = [""]
        for part in text.replace("**", "").replace("`", "").split("\n"):
            for word in part.split():
                longer = f"{lines[-1]} {word}".strip()
                if font.getlength(longer) <= width * self.scale:
                    lines[-1] = longer
                else:
                    lines.append(word)
            lines.append("")
        pitch = size * 1.3
        for number, line in enumerate(lines[: int(height / pitch)]):
            self.draw.text(self.at(x, y + number * pitch), line.lstrip("# "), fill, font, "la")


def bounds(workflow: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of all groups and nodes."""
    boxes = [group["bounding"] for group in workflow["groups"]]
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append([x, y - TITLE_HEIGHT, width, height + TITLE_HEIGHT])
    return (
        min(x for x, _, _, _ in boxes) - MARGIN,
        min(y for _, y, _, _ in boxes) - MARGIN,
        max(x + width for x, _, width, _ in boxes) + MARGIN,
        max(y + height for _, y, _, height in boxes) + MARGIN,
    )


def slot(node: dict[str, Any], kind: str, index: int) -> tuple[float, float]:
    """Where the link of the node's `index`-th input or output ends."""
    (x, y), (width, _) = node["pos"], node["size"]
    return (x if kind == "inputs" else x + width), y + 14 + index * 20


def draw_link(canvas: Canvas, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """A cubic curve that leaves and arrives horizontally, as ComfyUI draws them."""
    reach = max(40.0, abs(end[0] - start[0]) * 0.4)
    points = []
    for step in range(41):
        t = step / 40
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        xs = (start[0], start[0] + reach, end[0] - reach, end[0])
        ys = (start[1], start[1], end[1], end[1])
        x, y = (sum(w * v for w, v in zip(weights, values, strict=True)) for values in (xs, ys))
        points.append(canvas.at(x, y))
    canvas.draw.line(points, colour, max(2, round(3.5 * canvas.scale)), "curve")


def draw_node(canvas: Canvas, node: dict[str, Any], schema: dict[str, Any]) -> None:
    """Box, title and the names of the slots; then what is inside."""
    (x, y), (width, height) = node["pos"], node["size"]
    ours = node["type"].startswith("XDiT")
    title = node.get("title") or schema["display_name"]
    canvas.box(
        x,
        y - TITLE_HEIGHT,
        width,
        height + TITLE_HEIGHT,
        node.get("bgcolor", BODY),
        radius=10,
        outline=OURS if ours else None,
    )
    inset = 3 if ours else 0
    canvas.box(
        x + inset,
        y - TITLE_HEIGHT + inset,
        width - 2 * inset,
        TITLE_HEIGHT - inset,
        node.get("color", HEADER),
        radius=8,
    )
    canvas.text(x + 14, y - TITLE_HEIGHT / 2 + 1, title, 21, TITLE_TEXT, width=width - 24)
    for kind, anchor, shift in (("inputs", "lm", 14), ("outputs", "rm", -14)):
        for index, entry in enumerate(node[kind]):
            sx, sy = slot(node, kind, index)
            canvas.text(sx + shift, sy, entry["name"], 15, TEXT, anchor=anchor)
            canvas.dot(sx, sy, SLOTS.get(entry["type"], MUTED))
    top = y + 6 + 20 * max(len(node["inputs"]), len(node["outputs"]))
    if node["type"] in PARAGRAPHS:
        room = y + height - top
        canvas.box(x + 10, top, width - 20, room - 10, FIELD)
        text = node["widgets_values"][0]
        canvas.paragraph(x + 20, top + 8, text, 16, TEXT, width=width - 40, height=room - 26)
    elif node["type"] != "SaveImage":
        draw_widgets(canvas, x, top, width, widgets(schema), node["widgets_values"])


def draw_widgets(canvas: Canvas, x: float, top: float, width: float, names: list[str], values: list[Any]) -> None:
    """A row for each: its name on the left, its value on the right."""
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        y, middle = top + index * ROW, top + index * ROW + (ROW - 4) / 2
        canvas.box(x + 12, y, width - 24, ROW - 4, FIELD, radius=10)
        name_width = canvas.length(name, 14) + 22
        canvas.text(x + 22, middle, name, 14, MUTED)
        canvas.text(x + width - 22, middle, str(value), 15, TEXT, anchor="rm", width=width - 44 - name_width)


def draw(workflow: dict[str, Any], object_info: dict[str, Any]) -> Image.Image:
    """The graph as an image, WIDTH_PX wide."""
    left, top, right, bottom = bounds(workflow)
    scale = WIDTH_PX * OVERSAMPLING / (right - left)
    large = Image.new("RGB", (WIDTH_PX * OVERSAMPLING, round((bottom - top) * scale)), BACKGROUND)
    canvas = Canvas(draw=ImageDraw.Draw(large), scale=scale, origin=(left, top))
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        canvas.box(x, y, width, height, GROUP, radius=8)
        canvas.text(x + 14, y + 24, group["title"], 24, MUTED)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    # Links first: as in ComfyUI they run behind the nodes.
    for _, source, out, target, into, kind in workflow["links"]:
        start, end = slot(nodes[source], "outputs", out), slot(nodes[target], "inputs", into)
        draw_link(canvas, start, end, SLOTS.get(kind, MUTED))
    for node in nodes.values():
        draw_node(canvas, node, object_info.get(node["type"], {"display_name": node["type"]}))
    return large.resize((WIDTH_PX, round(large.height / OVERSAMPLING)), Image.Resampling.LANCZOS)


def main() -> None:
    object_info = json.loads(OBJECT_INFO.read_text("utf-8"))
    for path in sorted(FOLDER.glob("*.json")):
        workflow = json.loads(path.read_text("utf-8"))
        picture = draw(workflow, object_info)
        picture.save(path.with_suffix(".jpg"), quality=QUALITY, optimize=True, comment=digest(workflow))


if __name__ == "__main__":
    main()
