"""What evaluate.py does with a model once it is loaded: selection.py finds its pictures, detection.py and segmentation.py score it, the
others compare and count."""
