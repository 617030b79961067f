"""Long convolutions by Fourier transforms in Monarch form."""
