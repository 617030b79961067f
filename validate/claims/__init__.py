"""Published claims of the modelled systems against what the model says."""
