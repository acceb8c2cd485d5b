"""glyphs: digits in a font that ships inside Pillow, once in grey and once in colour.

The default data set: generated in seconds, without a download. The images do not depend on --seed.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data

# red, yellow, green, cyan, blue, magenta: the complement of hue k is hue (k + 3) % 6
HUES = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]]).float()


def load(name, root):
    """Grey 1x28x28 and colour 3x32x32 images of the same digit, 10,000 for training and 2,000 for
    testing. Nothing is read from `root`."""
    return data.Dataset(
        name=name,
        train=glyphs(10_000, seed=0),
        test=glyphs(2_000, seed=1),
        spec={"name": name},
        names=("grey", "colour"),
        views={"grey": (0,), "colour": (1,)},
    )


def templates():
    """The ten digits, white on black. -> (10, 1, 64, 64)"""
    font, digits = ImageFont.load_default(56), []
    for digit in "0123456789":
        page = Image.new("L", (64, 64))
        ImageDraw.Draw(page).text((32, 32), digit, font=font, fill=255, anchor="mm", stroke_width=2)
        digits.append(torch.from_numpy(np.array(page)))
    return torch.stack(digits)[:, None].float() / 255


def glyphs(n, seed):
    """n pairs of images with their digits. The ink has one of six hues, independent of the digit,
    the dark paper the complementary one. -> data.Split"""
    digits, generator = templates(), torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def warp(labels, size):
        """The digits rotated by up to 9 degrees, sheared, scaled by 1 to 1.2, shifted by up to 4 %.
        -> (n, 1, size, size)"""
        angle, shear, zoom = uniform(-0.16, 0.16), uniform(-0.05, 0.05), uniform(1, 1.2)
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        across = torch.stack([cos, shear * cos - sin, uniform(-0.08, 0.08)], -1)
        down = torch.stack([sin, shear * sin + cos, uniform(-0.08, 0.08)], -1)
        images = []
        for part, theta in zip(labels.split(1000), torch.stack([across, down], 1).split(1000)):
            grid = F.affine_grid(theta, (len(part), 1, size, size), align_corners=False)
            images.append(F.grid_sample(digits[part], grid, align_corners=False))
        return torch.cat(images)

    labels = torch.randint(10, (n,), generator=generator)
    grey, shape = warp(labels, 28), warp(labels, 32)
    hue = torch.randint(6, (n,), generator=generator)
    ink = 0.25 + 0.75 * HUES[hue].view(n, 3, 1, 1)
    paper = 0.03 + 0.25 * HUES[(hue + 3) % 6].view(n, 3, 1, 1)
    colour = uniform(0.85, 1, 1, 1, 1) * (paper + (ink - paper) * shape)
    colour = colour + 0.02 * torch.randn(colour.shape, generator=generator)
    bases = [(255 * x.clamp(0, 1)).round().byte() for x in (grey, colour)]
    return data.Split(bases, labels=labels)
