"""The operators: torchvision's names and signatures, a readable reference each, kernels built at the first call.

Read boxes, box_coding, nms, roi_align, roi_pool, deform_conv2d, paste_masks, focal_loss; then _extension (how a kernel is built and found).
`python -m minidamage.ops` is the doctor.
"""
from .box_coding import decode_boxes, encode_boxes
from .box_losses import (box_iou_loss, complete_box_iou, complete_box_iou_loss, distance_box_iou, distance_box_iou_loss,
                         generalized_box_iou_loss)
from .boxes import box_area, box_convert, box_iou, clip_boxes_to_image, generalized_box_iou, remove_small_boxes
from .deform_conv2d import DeformConv2d, deform_conv2d
from .focal_loss import sigmoid_focal_loss, softmax_focal_loss
from .linear_attention import linear_attention, linear_attention_maps
from .nms import batched_nms, batched_nms_padded, nms, nms_padded
from .paste_masks import paste_masks_bool, paste_masks_in_image, paste_masks_rle
from .roi_align import RoIAlign, multiscale_roi_align, roi_align
from .roi_pool import RoIPool, roi_pool
