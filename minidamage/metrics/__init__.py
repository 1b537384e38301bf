"""Scores: detection (COCO, VOC), pixels (pooled, per image), intervals. Read coco, detection, operating, voc."""
