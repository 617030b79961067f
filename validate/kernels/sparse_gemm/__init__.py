"""Matrix products with 2:4 structured sparsity, through torch."""
