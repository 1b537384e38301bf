"""Scores: detection (COCO, VOC), pixels (pooled, per image), intervals. Reading order: coco, detection, operating, voc, segmentation, statistics."""
