"""How the tensors of several ops lie in memory, and boxes given picture by picture as the rows of one tensor."""
import torch


def is_channels_last(x):
    """False where both orders are the same memory."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def memory_format_of(x):
    """The one that a result keeps."""
    return memory_format(is_channels_last(x))


def to_rois(boxes, input, name):
    """A list of [R_n, 4] becomes [R, 5] with the picture's index in front; a tensor is that already. name: the op's, for its ValueError."""
    if isinstance(boxes, torch.Tensor):
        return boxes
    if not isinstance(boxes, (list, tuple)) or any(box.dim() != 2 or box.shape[1] != 4 for box in boxes):
        raise ValueError(f"{name}: expected boxes as a tensor [R, 5] or a list of tensors [R_n, 4], one for each picture, got "
                         f"{[list(box.shape) for box in boxes] if isinstance(boxes, (list, tuple)) else type(boxes).__name__}")
    if len(boxes) == 0:
        return input.new_zeros((0, 5))
    return torch.cat([torch.cat([torch.full_like(box[:, :1], n), box], 1) for n, box in enumerate(boxes)])
