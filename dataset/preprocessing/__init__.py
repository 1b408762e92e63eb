"""Raw interactions and item texts to data sets in the published layout; item texts to feature files."""
