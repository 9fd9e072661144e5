"""The data: where samples come from, how the classes are partitioned, how batches are made.

    sources    digits, CIFAR-10, CIFAR-100 as uint8 tensors, and the others by name
    folder, cub    image folders, CUB-200-2011
    files      a hash of image files, and their pixels
    partition  deposit set and preservation set, with a hash of the samples
    loading    the images that a partition names
    batches    shuffled, augmented, normalised batches made on the training device
"""

from datasets.batches import ImageSet, batches, evaluation_batches, first_images
from datasets.loading import evaluation_sets, load_if_there, load_images
from datasets.partition import make_partition, partition_of_run, read_partition
from datasets.sources import DATASETS

__all__ = ["DATASETS", "ImageSet", "batches", "evaluation_batches", "evaluation_sets", "first_images", "load_if_there",
           "load_images", "make_partition", "partition_of_run", "read_partition"]
