"""glyphs: the digits of a font that ships inside Pillow, grey and in colour, made on the spot.

It needs no download and takes seconds: what a first run learns from. The pages are fixed, whatever
--seed says.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
from benchmarks import oracles


ORACLE_STEPS = {"grey": 200, "colour": 200}
# red, yellow, green, cyan, blue, magenta: each is three places from its opposite
HUES = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]]).float()


def load(name, root):
    """Grey 1x28x28 and coloured 3x32x32 images of the same digit, 10,000 + 2,000. Nothing is read
    from `root`.

    The ink has one of six hues, whatever the digit, and the dark paper the opposite one.
    """
    train, test = glyphs(10_000, seed=0), glyphs(2_000, seed=1)
    return data.Dataset(name, train, test, {"name": "glyphs"}, ("grey", "colour"))


def views(dataset):
    """What the oracles judge: each image."""
    return oracles.each(dataset.names)


def glyphs(n, seed):
    """n pairs of images and their digits. -> data.Split"""
    font, templates = ImageFont.load_default(56), []
    for digit in "0123456789":
        page = Image.new("L", (64, 64))
        ImageDraw.Draw(page).text((32, 32), digit, font=font, fill=255, anchor="mm", stroke_width=2)
        templates.append(torch.from_numpy(np.array(page)))
    templates = torch.stack(templates)[:, None].float() / 255  # (10, 1, 64, 64)
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def warped(labels, size):
        """Rotated by up to 9 degrees, sheared, 1 to 1.2 times as large, shifted by up to 4 %.
        -> (n, 1, size, size)"""
        angle, shear, zoom = uniform(-0.16, 0.16), uniform(-0.05, 0.05), uniform(1, 1.2)
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        across = torch.stack([cos, shear * cos - sin, uniform(-0.08, 0.08)], -1)
        down = torch.stack([sin, shear * sin + cos, uniform(-0.08, 0.08)], -1)
        pages = []
        for page, theta in zip(labels.split(1000), torch.stack([across, down], 1).split(1000)):
            grid = F.affine_grid(theta, (len(page), 1, size, size), align_corners=False)
            pages.append(F.grid_sample(templates[page], grid, align_corners=False))
        return torch.cat(pages)

    labels = torch.randint(10, (n,), generator=generator)
    grey, shape = warped(labels, 28), warped(labels, 32)
    hue = torch.randint(6, (n,), generator=generator)
    ink = 0.25 + 0.75 * HUES[hue].view(n, 3, 1, 1)
    paper = 0.03 + 0.25 * HUES[(hue + 3) % 6].view(n, 3, 1, 1)
    colour = uniform(0.85, 1, 1, 1, 1) * (paper + (ink - paper) * shape)
    colour = colour + 0.02 * torch.randn(colour.shape, generator=generator)
    bases = [(255 * x.clamp(0, 1)).round().byte() for x in (grey, colour)]
    return data.Split(bases, labels=labels)
