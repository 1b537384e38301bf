"""Pictures for people: `overlay` (detections over a photograph), `plots` (curves and bars), `report` (one HTML file), `stages` (Fig. 6).

Drawn with Pillow alone. Read overlay.py first.
"""
