"""First-order linear recurrences h_t = a_t h_{t-1} + b_t along rows, forward and backward."""
