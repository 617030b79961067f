"""Time of one kernel: the model rung, one file a kernel family, all built from the same terms."""
