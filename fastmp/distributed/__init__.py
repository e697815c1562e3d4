"""Training on several devices: process groups, data parallel gradients, sharded models."""
