"""One module per algorithm: closed-form counts beside the program that proves them."""
