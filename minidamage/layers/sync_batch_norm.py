"""Batch normalisation over the pictures of all processes (train.py --sync-bn): with two or four pictures a GPU, a batch's own mean and
variance are noise; over the whole batch they are those that one process would see.

    forward     m = sum(x) / n,  v = sum((x - m)^2) / n                        sums over all processes, n positions
    backward    dx = w / s (g - mean(g) - x^ mean(g x^)),  x^ = (x - m) / s,  s = sqrt(v + eps)

Three exchanges of C numbers a layer and step. The two sums of the backward pass are also the gradients of bias and weight. Runs on a
CPU and on a GPU (torch.nn.SyncBatchNorm: on a GPU alone); names, numbers and state_dict are BatchNorm2d's.

Read first: minidamage/distributed.py.
"""
import torch
from torch import nn
from torch.nn import functional as F

from minidamage.distributed import summed, world


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of all processes' pictures. In evaluation, and in one process, BatchNorm2d."""

    @classmethod
    def of(cls, norm):
        """One with the parameters and the statistics of a BatchNorm2d: the very same tensors."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made.weight, made.bias, made.training = norm.weight, norm.bias, norm.training
        for name, buffer in norm.named_buffers():
            setattr(made, name, buffer)
        return made

    def forward(self, x):
        """x: [N, C, H, W], the same shape in no two processes needed. Raises ValueError without an affine map or running statistics."""
        if not self.training or world() == 1:
            return super().forward(x)
        if self.weight is None or self.running_mean is None or self.momentum is None:
            raise ValueError("SyncBatchNorm2d: expected weight, bias, running statistics and a momentum, got a norm without; leave "
                             "--sync-bn out")
        out, mean, variance, count = NormaliseTogether.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += 1
        return out


class NormaliseTogether(torch.autograd.Function):
    """(x, weight [C], bias [C], eps) -> (out like x, mean [C], variance [C], count): the last three float32, over all processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        C = x.shape[1]
        values = at_least_float32(x)
        sums = summed(torch.cat([values.sum((0, 2, 3)), values.new_full((1,), x.numel() // C)]))
        count = sums[-1]
        mean = sums[:C] / count
        variance = summed((values - mean.view(1, C, 1, 1)).square().sum((0, 2, 3))) / count             # two passes: no cancellation
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, variance, count = ctx.saved_tensors
        C = x.shape[1]
        inverse = torch.rsqrt(variance + ctx.eps)
        unit = (at_least_float32(x) - mean.view(1, C, 1, 1)) * inverse.view(1, C, 1, 1)
        gradient = at_least_float32(gradient)
        for_bias, for_weight = gradient.sum((0, 2, 3)), (gradient * unit).sum((0, 2, 3))                # this process's: averaged later
        sums = summed(torch.cat([for_bias, for_weight])) / count
        for_x = (gradient - sums[:C].view(1, C, 1, 1) - unit * sums[C:].view(1, C, 1, 1)) * (weight * inverse).view(1, C, 1, 1)
        return for_x.to(x.dtype), for_weight.to(weight.dtype), for_bias.to(weight.dtype), None


def at_least_float32(x):
    """x, out of a half: the sum of a map does not fit one."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def synchronise_norms(model):
    """Replaces every trainable BatchNorm2d of a model, in place, and returns how many there were. Frozen ones and group norms stay."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if type(child) is nn.BatchNorm2d]
    for parent, name, child in found:
        setattr(parent, name, SyncBatchNorm2d.of(child))
    return len(found)
