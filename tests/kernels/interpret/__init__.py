"""Every Triton kernel against fp64: in Triton's interpreter, or on a GPU if there is one."""
