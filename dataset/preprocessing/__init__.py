"""From raw interactions and item texts to data sets in the published layout, and to feature files."""
