"""Where batches come from: sources of raw samples -> records -> batches, in an order that is arithmetic."""
