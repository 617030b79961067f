"""What the work is: ops, their counts and programs, model architectures and plans as data."""
