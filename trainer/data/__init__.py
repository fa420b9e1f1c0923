"""Raw data to dataset: sources, cleaning, deduplication, splitting, tokenising and packing."""
