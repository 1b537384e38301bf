"""Anchors (Ren et al. 2015, arXiv:1506.01497): the boxes that the RPN scores and moves, the same at every position of a map.

The arithmetic is torchvision's to the bit (cell anchors rounded to whole pixels, the grid starting at the picture's corner,
strides taken as picture size // map size), because published weights have learned offsets from exactly these boxes.

Read first: fpn.py. Read next: matching.py.
"""
import torch
from torch import nn


class AnchorGenerator(nn.Module):
    """sizes: per level, the square roots of the anchors' areas in pixels. aspect_ratios: height / width, the same at every level."""

    def __init__(self, sizes=((32,), (64,), (128,), (256,), (512,)), aspect_ratios=(0.5, 1.0, 2.0)):
        super().__init__()
        self.sizes = tuple(tuple(level) for level in sizes)
        self.aspect_ratios = tuple(aspect_ratios)
        self._cache = {}

    def num_anchors_per_location(self):
        return [len(level) * len(self.aspect_ratios) for level in self.sizes]

    def forward(self, grid_sizes, image_size, device):
        """grid_sizes: [(h, w)] of the maps; image_size: (h, w) of the batch that they come from, pixels.

        Returns per level [h * w * A, 4] float32 xyxy, position by position (row first), anchor shapes innermost.
        """
        if len(grid_sizes) != len(self.sizes):
            raise ValueError(f"anchors: expected {len(self.sizes)} feature maps (one for each entry of sizes), got {len(grid_sizes)}")
        key = (tuple(tuple(size) for size in grid_sizes), tuple(image_size), device)
        if key not in self._cache:
            if len(self._cache) >= 16:                    # pictures of many shapes: keep the memory bounded
                self._cache.clear()
            self._cache[key] = [self.level_anchors(sizes, grid, image_size, device) for sizes, grid in zip(self.sizes, key[0])]
        return self._cache[key]

    def level_anchors(self, sizes, grid_size, image_size, device):
        cell = cell_anchors(sizes, self.aspect_ratios).to(device, non_blocking=True)  # on a GPU nothing waits for a new shape of pictures
        stride_y, stride_x = image_size[0] // grid_size[0], image_size[1] // grid_size[1]
        y = torch.arange(grid_size[0], dtype=torch.float32, device=device) * stride_y
        x = torch.arange(grid_size[1], dtype=torch.float32, device=device) * stride_x
        y, x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=-1)                                     # [h, w, 4]
        return (shifts[:, :, None] + cell).reshape(-1, 4)


def cell_anchors(sizes, aspect_ratios):
    """[len(aspect_ratios) * len(sizes), 4] float32: the anchors of one position, centred on 0, rounded to whole pixels."""
    sizes = torch.tensor(sizes, dtype=torch.float32)
    h_ratios = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
    w_ratios = 1 / h_ratios
    widths = (w_ratios[:, None] * sizes[None]).reshape(-1)
    heights = (h_ratios[:, None] * sizes[None]).reshape(-1)
    return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()
