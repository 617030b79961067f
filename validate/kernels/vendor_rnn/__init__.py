"""Recurrent layers by the vendor: cuDNN through torch."""
