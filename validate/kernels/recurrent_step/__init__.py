"""Recurrent layers of several heads, all time steps in one launch."""
