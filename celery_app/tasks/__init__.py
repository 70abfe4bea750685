"""The tasks: arrays, linalg, images and vectors run on a GPU; reports run on the worker's CPU."""
