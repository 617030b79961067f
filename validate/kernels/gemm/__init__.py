"""Dense matrix products, as linear layers ask for them."""
