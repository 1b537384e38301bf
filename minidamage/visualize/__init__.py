"""Pictures for people: `overlay` (detections over a photograph), `label_maps` (pixel labels, their errors, attention), `plots` (curves,
bars, boxes), `report` (one HTML file), `stages` (Fig. 6).

Drawn with Pillow alone. Read overlay.py first.
"""
