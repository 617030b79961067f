"""DeltaNet and the gated delta rule in chunks, forward."""
