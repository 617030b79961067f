"""Arrays that stream once: the memory ceilings, and the maps that should reach them."""
