"""A context in, the network from z to raw numbers out."""
