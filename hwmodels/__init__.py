"""What the hardware can do: devices, memory levels, clusters. Imports nothing else of ours."""
