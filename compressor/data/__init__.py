"""Labelled images: found or generated, checked, split, decoded once, fed in batches."""

from compressor.data.dataset import Dataset, Split, calibration_indices
from compressor.data.image_folder import write_images
from compressor.data.load import class_labels, load_dataset

__all__ = ["Dataset", "Split", "calibration_indices", "class_labels", "load_dataset", "write_images"]
