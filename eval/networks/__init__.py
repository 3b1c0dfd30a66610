"""Frozen networks that look at pictures: features, detections, colours."""
