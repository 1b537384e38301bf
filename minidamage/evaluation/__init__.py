"""What evaluate.py does with a model once it is loaded: detection.py and segmentation.py score it, the others compare and count."""
