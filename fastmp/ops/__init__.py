"""The operations, one file each: schema, fake, checks, reference in plain PyTorch. No devices."""
