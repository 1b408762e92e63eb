"""The parts that models are made of: losses, encoders, and the fast versions of both."""
