"""What was measured, and how well the prediction did; the only floor that may use torch."""
