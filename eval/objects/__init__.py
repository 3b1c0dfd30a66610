"""GenEval with a detector of COCO objects: prompts, detectors, colours, cached detections, scores."""
