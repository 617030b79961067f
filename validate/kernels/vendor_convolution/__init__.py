"""Convolutions of images by the vendor: cuDNN through torch."""
