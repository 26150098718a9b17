"""Passages drawn as pages: what a retriever of document screenshots reads, made of any text on the spot."""

from __future__ import annotations

import io
import textwrap

CHARACTERS = 40  # of a line
SIZE = 12  # of a character, in pixels
MARGIN = 8


def page(text: str) -> bytes:
    """A PNG with the text in black on white; the same text gives the same bytes under one version of Pillow."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(SIZE)
    lines = "\n".join(textwrap.wrap(text, CHARACTERS)) or " "
    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((MARGIN, MARGIN), lines, font=font)
    image = Image.new("RGB", (int(right) + MARGIN, int(bottom) + MARGIN), "white")
    ImageDraw.Draw(image).multiline_text((MARGIN, MARGIN), lines, "black", font=font)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
