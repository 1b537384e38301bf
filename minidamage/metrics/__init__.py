"""Scores: detection (COCO, VOC), pixels (pooled, per image, over thresholds, thin damage), intervals and tests.

Read coco, detection, operating, voc; then segmentation, thresholds, crack, statistics.
"""
