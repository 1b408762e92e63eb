"""Turns raw interactions and item texts into data sets in the published layout, and into feature files."""
