"""Every Triton kernel compiled for every architecture, and its machine code looked at."""
