"""The data: where samples come from, how the classes are partitioned, how batches are made.

    sources    digits, CIFAR-10, CIFAR-100 and image folders as uint8 tensors
    partition  deposit set and preservation set, with a hash of the samples
    cache      decoded images kept beside the data
    cub, ragged, decode    CUB-200-2011, photographs of differing sizes, image files to pixels
    batches    shuffled, augmented, normalised batches made on the training device
"""

from datasets.batches import ImageSet, batches, evaluation_batches
from datasets.loading import evaluation_sets, load_if_there, load_images
from datasets.partition import Partition, make_partition, read_partition
from datasets.sources import DATASETS, open_source

__all__ = ["DATASETS", "ImageSet", "Partition", "batches", "evaluation_batches", "evaluation_sets", "load_if_there",
           "load_images", "make_partition", "open_source", "read_partition"]
